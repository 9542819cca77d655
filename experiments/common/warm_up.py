"""The supervised warm-up on the answer grammar that a small language model needs before RL."""

import shutil
import subprocess
import sys
from pathlib import Path

# explain_decimals=false: the words that the tables of these experiments were made with.
OPTIONS = """
+experiment={task} data.source=path model=smollm2-135m model.source=wheel logger.console=plain
model.explain_decimals=false
sft.mixture=short sft.batch=3 sft.rows=4 sft.lr=4e-4 sft.warmup_steps=50 sft.decay=0.7
sft.log_every=5 sft.save_every=20 sft.eval_every=0 optim.betas=[0.9,0.95]
"""


def warm_up(rows: Path, task: str, steps: int, runs: Path, logs: Path) -> Path:
    """The folder of the policy that every method starts from, made unless it is there.

    It learns from the training rows of the task; its log goes to `logs/warmup.jsonl`.
    """
    folder = runs / "warmup"
    if (folder / "model.safetensors").exists():
        return folder
    unfinished = folder.with_name("warmup.unfinished")
    logs.mkdir(exist_ok=True)
    words = OPTIONS.format(task=task).split()
    words += [f"data.path={rows}", f"run_dir={unfinished}", f"sft.steps={steps}"]
    done = subprocess.run([sys.executable, "-m", "mar.sft", *words], check=False)
    if done.returncode:
        sys.exit(f"mar.sft {' '.join(words)} ended with {done.returncode}")
    shutil.copy(unfinished / "sft.jsonl", logs / "warmup.jsonl")
    unfinished.rename(folder)
    return folder
