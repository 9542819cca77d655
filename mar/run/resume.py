"""Go on where an interrupted run stopped."""

import json
from pathlib import Path
from typing import Any

from mar.files import truncate_jsonl
from mar.learn.learner import Learner
from mar.run import checkpoint
from mar.run.console import Display

RECORDS = ("metrics.jsonl", "completions.jsonl", "skipped.jsonl")


def resume(folder: Path, learner: Learner, document: dict[str, Any], display: Display) -> int:
    """Restore the newest valid checkpoint of a run, and forget what it wrote after that.

    `document` (what `eval.json` holds) gets back the evaluations up to there. Returns the number of
    updates that the checkpoint holds; 0 where there is none.
    """
    # One rank reads and chooses: another might find another one, and all would hash all of it.
    found = learner.world.told(lambda: checkpoint.newest(folder / "checkpoints", display.say))
    step = 0
    if found:
        step = found.step
        critic = checkpoint.critic_of(learner)
        for _ in range(min(step, learner.config.algo.lag)):
            learner.remember_weights()  # tensors for the checkpoint to fill
        checkpoint.restore(
            found,
            learner.policy,
            learner.optimizer,
            critic,
            learner.world,
            list(learner.past_weights),
        )
        display.say(f"resuming after step {step} from {found.path}")

    if learner.world.leads:
        for name in RECORDS:
            truncate_jsonl(folder / name, step)

    evaluations = folder / "eval.json"
    if evaluations.exists():
        old: dict[str, Any] = json.loads(evaluations.read_text())
        if old.get("before"):
            document["before"] = old["before"]
            history = old.get("history", [])
            document["history"] = [entry for entry in history if entry["step"] <= step]
    return step
