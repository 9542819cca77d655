"""What a run with many rows costs before its first step, and what drawing the questions of a step
costs: the whole data path of `python -m mar.train +experiment=paper scale=h100x8`, without a model.

    python experiments/bench/startup.py [--rows 1000000] [--folder FOLDER] [--tree FOLDER]

The rows are invented, in the form of DDXPlus's own files (synthetic_rows.py). A process of its own
imports `mar.train`, composes the config and calls `build_training` with `build_learner` taken out:
reading, splits, the held-out items, the checks of lengths. The tokenizer is the embedded model's
(Qwen3's is not here), in a folder whose config says 40,960 positions. `--tree` measures another
checkout, such as an older commit. A step's draw is timed after a pause, as the training of a step
is one. Shown are seconds (and seconds of processor, where other processes were busy), the peak of
resident memory of the process, torch and transformers included. results/startup.csv has the history.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "rows",
    "prompts",
    "held_out",
    "seconds",
    "cpu_seconds",
    "peak_MB",
    "draw_ms",
    "worst_draw_ms",
)
POSITIONS = 40_960  # of Qwen3-8B
DRAWS = 10
PAUSE_S = 4.0  # a step of the paper takes minutes


def worker(model: str, patients: str) -> None:
    """In a fresh process: start a run, draw some steps, print one JSON line."""
    began = time.perf_counter()
    from mar.run import setup
    from mar.run.compose import compose
    from mar.run.console import Display
    from mar.train import run  # noqa: F401  what a run imports counts

    def no_model(*_: object, **__: object) -> None:
        """In the place of an 8B model."""

    setup.build_learner = no_model  # type: ignore[assignment]
    words = ["+experiment=paper", "scale=h100x8", "data.source=path", f"data.path={patients}"]
    words += ["model=hf", "model.source=folder", f"model.path={model}"]
    words += ["model.max_completion_tokens=1536", "sampler.kv_budget_tokens=131072"]
    training = setup.build_training(compose(words), Path(model), Display("plain", 0, 0))
    seconds = time.perf_counter() - began

    draws = []
    for step in range(DRAWS + 1):
        draw_began = time.perf_counter()
        training.prompt_order.of_step(step)
        draws.append(1000 * (time.perf_counter() - draw_began))
        time.sleep(PAUSE_S)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "prompts": len(training.prompt_order.prompts),
                "held_out": len(training.held_out.prompts),
                "seconds": seconds,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_MB": usage.ru_maxrss / 1000,
                "draw_ms": statistics.median(draws[1:]),
                "worst_draw_ms": max(draws[1:]),
            }
        )
    )


def model_folder(folder: Path) -> Path:
    """The embedded model's tokenizer, and a config with many positions."""
    embedded = ROOT / "mar" / "embedded" / "model"
    folder.mkdir()
    for file in embedded.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = POSITIONS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(tree: Path, model: Path, patients: Path) -> dict[str, Any]:
    """What `worker` prints when the code is that of `tree`."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(model), str(patients)],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the rows are, or are written and kept")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout that is measured")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    sys.path.insert(0, str(ROOT))
    from experiments.bench.common import quiet_machine, record
    from experiments.bench.synthetic_rows import PATIENTS, write

    quiet_machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "rows"
        patients = folder / PATIENTS
        if not patients.exists():
            write(folder, args.rows)
        model = model_folder(Path(scratch) / "model")
        row = {"rows": args.rows, **measure(args.tree.resolve(), model, patients)}
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(
        describe, capture_output=True, text=True, check=False, cwd=args.tree
    ).stdout.strip()
    for column in COLUMNS:
        print(f"{column:>15}  {row[column]:,.6g}")
    record(
        Path(__file__).parent / "results" / "startup.csv",
        COLUMNS,
        {f"paper_{args.rows}_rows_at_{commit}": [row[column] for column in COLUMNS]},
        {f"paper_{args.rows}_rows_at_{commit}": 1},
    )


if __name__ == "__main__":
    main()
