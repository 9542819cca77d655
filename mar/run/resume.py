"""run.resume."""

import json
from collections.abc import Mapping
from typing import Any

from mar.files import truncate_jsonl
from mar.learn.learner import Job
from mar.run import checkpoint
from mar.run.console import Display


def resume(job: Job, document: dict[str, Any], display: Display) -> int:
    """Restore the newest valid checkpoint; returns the number of updates it holds (0: there is none)."""
    found = checkpoint.newest(job.folder / "checkpoints", display.say)
    step = found.step if found else 0
    if found:
        checkpoint.restore(found, job.model, job.optimizer, job.critic, job.world)
        display.say(f"resuming after step {step} from {found.path}")
    for name in ("metrics.jsonl", "completions.jsonl", "skipped.jsonl") if job.world.leads else ():
        truncate_jsonl(job.folder / name, step)
    if (job.folder / "eval.json").exists():
        old: Mapping[str, Any] = json.loads((job.folder / "eval.json").read_text())
        if old.get("before"):
            document |= {
                "before": old["before"],
                "history": [h for h in old.get("history", []) if h["step"] <= step],
            }
    return step
