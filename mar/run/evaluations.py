"""The measurements of a run's policy on its held-out prompts, kept in `eval.json`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.files import append_jsonl, jsonable, write_json
from mar.measure.held_out import measure
from mar.run.completions import completion_row
from mar.run.console import Display
from mar.run.setup import Training
from mar.run.summary import summary

NUM_TEXTS = 200  # completions that are kept of each measurement


@dataclass
class Evaluations:
    """Measures the policy `before` and `after` training and every `eval.every` steps.

    `document` is what `eval.json` holds: the two columns of the closing table, and a history.
    """

    training: Training
    folder: Path
    display: Display
    document: dict[str, Any]

    def is_due(self, step: int) -> bool:
        """Whether the policy is measured after this step, between start and end."""
        config = self.training.config
        every = config.eval.every
        return every > 0 and step % every == 0 and 0 < step < config.train.steps

    def catch_up(self, step: int) -> None:
        """What is missing when a run starts or goes on after `step`: the measurement before
        training, or one that was interrupted after its checkpoint."""
        if step == 0 and "before" not in self.document:
            self.measure("before", 0)
        elif "before" not in self.document:
            # The policy has learnt since: what is measured now is not what it was before.
            self.display.say(
                f"{self.folder}/eval.json is gone, and with it the measurement before training: it "
                "cannot be made again"
            )
        history = self.document.get("history", [])
        last = history[-1]["step"] if history else 0
        if self.is_due(step) and last < step:
            self.measure(f"step {step}", step)

    def measure(self, stage: str, step: int) -> None:
        """Measure the policy, add it to `eval.json`, and say so."""
        began = time.perf_counter()
        training = self.training
        learner = training.learner
        num_answers = training.config.reward.num_answers
        world = learner.world
        num_prompts = len(training.held_out.prompts[world.share])
        with (
            learner.sampling_policy() as policy,
            self.display.counting(f"eval {stage}", num_prompts) as tick,
        ):
            metrics, rollouts = measure(policy, training.held_out, world, tick)

        texts = [completion_row(rollout, "eval", step) for rollout in rollouts[:NUM_TEXTS]]
        document = self.document
        earlier = [entry for entry in document.get("history", []) if entry["step"] < step]
        document["history"] = [*earlier, {"step": step, **metrics}]
        if stage in ("before", "after"):
            document[stage] = metrics
            document["gap_closed"] = summary(document, num_answers)["gap_closed"]
        if learner.world.leads:
            append_jsonl(self.folder / "completions.jsonl", texts)
        if self.display.mirror:
            self.display.mirror.completions(step, jsonable(texts))
        if learner.world.leads:
            # Last: with `after` in it the run counts as finished.
            write_json(self.folder / "eval.json", document)

        if metrics["format_rate"] == 0:
            self.display.say(self._why_no_form())
        shown = []
        for name in (f"coverage@{num_answers}", "top1", "ece", "format_rate"):
            if metrics.get(name) is not None:
                shown.append(f"{name} {metrics[name]:.3f}")
        seconds = time.perf_counter() - began
        self.display.say(
            f"eval {stage} ({len(rollouts)} items, {seconds:.0f} s)  {'  '.join(shown)}"
        )

    def _why_no_form(self) -> str:
        """What to say where no completion has the right form: it has no room, or is not known."""
        nothing = "no completion has the right form, so nothing can be learnt"
        config = self.training.config
        limit = config.model.max_completion_tokens
        needed = self.training.answer_tokens
        if limit < needed:
            return (
                f"{nothing}: reward.num_answers={config.reward.num_answers} take about {needed} "
                f"tokens and model.max_completion_tokens={limit} cuts them: raise it"
            )
        return f"{nothing}: warm the model up (python -m mar.sft), or take another"
