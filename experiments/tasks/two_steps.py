"""Two real steps of SmolLM2-135M on each task's real file.

    python -m experiments.tasks.two_steps --data FOLDER [--only TASK ...]

FOLDER holds the files of FILES. Batches are small (2 prompts x 4 completions of up to 256 tokens)
so that a CPU does a task in minutes; the rest is the user's own command. Writes two_steps.json
beside this file, task by task; `make report` makes the README's table of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.common.tables import markdown_table
from mar.files import read_jsonl
from mar.policy.sources import environment
from mar.run.console import format_metric

HERE = Path(__file__).parent
RESULTS = HERE / "two_steps.json"
FILES = {
    "medqa": "medqa/medqa_usmle_4opt_dev.jsonl",
    "ddxplus": "ddxplus/patients_all49_en.jsonl",
    "hotpotqa": "hotpotqa/distractor_100_dev_reflexion.jsonl",
    "ambigqa": "ambigqa/dev_light.json",
    "protoqa": "protoqa/dev.scraped.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
}
PROMPTS, GROUP = 2, 4
SMALL = f"""model=smollm2-135m model.max_prompt_tokens=2048 model.max_completion_tokens=256 train.steps=2 algo.prompts_per_step={PROMPTS}
    algo.group_size={GROUP} eval.num_items=4 logger.console=plain""".split()


def words(task: str, data: str, out: str) -> list[str]:
    """The command line of one task."""
    return [
        f"+experiment={task}",
        "data.source=path",
        f"data.path={data}/{FILES[task]}",
        *SMALL,
        f"out={out}",
    ]


def measured(task: str, data: Path) -> dict[str, Any]:
    """One run, and what its first step earned and cost."""
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "mar.train", *words(task, str(data.resolve()), out)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{task} ended with code {done.returncode}: {done.stdout[-300:]}")
        steps, _ = read_jsonl(Path(out) / task / "seed0" / "metrics.jsonl")
        first = steps[0]
        counts = next(line for line in done.stdout.splitlines() if "held-out prompts" in line)
        assert len(steps) == 2 and all(step["policy/loss"] is not None for step in steps)
        return {
            "command": " ".join(words(task, "<data>", "<out>")),
            "commit": environment()["commit"],
            "prompts": counts.partition(": ")[2].partition(";")[0],
            "reward": first["reward/total"],
            "format": first["train/format_rate"],
            "tokens": first["train/tokens_per_set"],
            "sample_s": first["perf/sample_s"],
            "verify_ms": 1000 * first["perf/verify_s"] / (PROMPTS * GROUP),
            "update_s": first["perf/update_s"],
            "losses": [step["policy/loss"] for step in steps],
            "seconds": round(time.monotonic() - began),
        }


def markdown() -> str:
    """The README's table."""
    header = [
        "task",
        "prompts",
        "reward at step 0",
        "right form",
        "tokens",
        "sampling, s",
        "verification, ms a completion",
        "update, s",
        "whole job, s",
    ]
    keys = ("reward", "format", "tokens", "sample_s", "verify_ms", "update_s")
    lines = []
    for task, row in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        cells = [format_metric(row[key]) for key in keys]
        lines.append([f"`{task}`", row["prompts"], *cells, f"{row['seconds']}"])
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=FILES, default=list(FILES), metavar="TASK")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for task in options.only:
        found[task] = measured(task, options.data)
        print(task, json.dumps(found[task]), flush=True)
        RESULTS.write_text(
            json.dumps({name: found[name] for name in FILES if name in found}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
