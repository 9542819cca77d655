"""The supervised warm-up on the answer grammar that a small language model needs before RL."""

import json
import subprocess
import sys
from pathlib import Path

from mar.files import write_jsonl
from mar.policy.sources import SMOLLM2, resolve_model

OPTIONS = "--mixture short --prompts 3 --rows 4 --lr 4e-4 --log-every 5".split()


def warm_up(rows: Path, task: str, steps: int, runs: Path, logs: Path) -> Path:
    """The folder of the policy that every method starts from, made unless it is there.

    It learns from the training rows of the task; its log goes to `logs/warmup.jsonl`.
    """
    folder = runs / "warmup"
    if (folder / "model.safetensors").exists():
        return folder
    unfinished = folder.with_name("warmup.unfinished")
    printed = folder.with_name("warmup.jsonl")
    logs.mkdir(exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    model, _ = resolve_model("wheel", SMOLLM2, None)
    words = ["--task", task, "--model", str(model), "--path", str(rows)]
    words += ["--out", str(unfinished), "--steps", str(steps), *OPTIONS]
    with printed.open("w") as log:
        done = subprocess.run([sys.executable, "-m", "mar.sft", *words], stdout=log, check=False)
    if done.returncode:
        sys.exit(f"mar.sft {' '.join(words)} ended with {done.returncode}")
    kept = []
    for line in printed.read_text().splitlines():
        row = json.loads(line)
        # These keys hold paths of this machine.
        kept.append({k: v for k, v in row.items() if k not in ("path", "model", "out")})
    write_jsonl(logs / "warmup.jsonl", kept)
    unfinished.rename(folder)
    return folder
