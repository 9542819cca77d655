"""Go on where an interrupted run stopped."""

import json
from pathlib import Path
from typing import Any

from mar.config import Config
from mar.errors import UserError
from mar.files import truncate_jsonl
from mar.learn.learner import Learner
from mar.learn.optim import learning_rate
from mar.policy.distributed import World
from mar.run import checkpoint
from mar.run.console import Display
from mar.run.folder import is_finished

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
        if "history" in old:
            document["history"] = [entry for entry in old["history"] if entry["step"] <= step]
    return step


def announce_extension(config: Config, old_steps: int, world: World, display: Display) -> None:
    """Say how a run goes on that was to have `old_steps` steps and gets more.

    Raises UserError where it was finished and its last checkpoint is gone: it would begin anew.
    """
    folder = Path(config.run_dir)
    steps = config.train.steps
    found = world.told(lambda: checkpoint.newest(folder / "checkpoints", display.say))
    done = found.step if found else 0
    if is_finished(folder) and done < old_steps:
        raise UserError(
            f"{folder} was finished after {old_steps} steps and has no readable checkpoint of the "
            f"last one, so it cannot go on to train.steps={steps}: choose another name= or seed="
        )
    display.say(
        f"{folder} had train.steps={old_steps} and gets {steps}: it goes on after step {done}"
    )
    optim = config.optim
    rates = []
    for number, length in ((done, old_steps), (done + 1, steps)):
        rate = learning_rate(number - 1, length, optim.lr, optim.warmup_frac, optim.schedule)
        rates.append(f"{rate:.3g} in step {number}")
    if done:
        display.say(
            f"the schedule ({optim.schedule}) is that of {steps} steps from now on: "
            f"the learning rate was {rates[0]} and is {rates[1]}"
        )
