"""What a run writes of each training step: one line of metrics, and every completion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mar.errors import UserError
from mar.files import append_jsonl
from mar.records import Rollout
from mar.run.completions import completion_row
from mar.run.console import Display


class StepRecord:
    """`metrics.jsonl`, `completions.jsonl` and `skipped.jsonl`, written by rank 0, and the console.

    `max_skips`: so many steps in a row that are not finite end the run.
    """

    def __init__(self, folder: Path, leads: bool, max_skips: int, display: Display) -> None:
        self.folder = folder
        self.leads = leads
        self.max_skips = max_skips
        self.display = display
        self.skips_in_a_row = 0

    def write(
        self, step: int, metrics: dict[str, Any], rollouts: Sequence[Rollout], advantages: Tensor
    ) -> None:
        """Record a finished step, counted from 1. advantages [B, T]."""
        if self.leads:
            rows = []
            for rollout, row_advantages in zip(rollouts, advantages.tolist(), strict=True):
                rows.append(completion_row(rollout, "train", step, row_advantages))
            append_jsonl(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
            append_jsonl(self.folder / "completions.jsonl", rows)
        self.display.step(step, metrics)

    def check_finite(self, step: int, metrics: dict[str, Any], rollouts: Sequence[Rollout]) -> None:
        """Keep the completions of a step whose updates were left out because they were not finite.
        Raises UserError after `max_skips` such steps in a row."""
        num_skipped = metrics["optim/skipped"]
        if not num_skipped:
            self.skips_in_a_row = 0
            return
        file = self.folder / "skipped.jsonl"
        if self.leads:
            append_jsonl(file, [completion_row(rollout, "train", step) for rollout in rollouts])
        self.display.say(
            f"step {step}: a loss or gradient is not finite, {num_skipped} updates were left out; "
            f"completions in {file}"
        )
        self.skips_in_a_row += 1
        if self.skips_in_a_row == self.max_skips:
            raise UserError(
                f"{self.max_skips} steps in a row were not finite: lower optim.lr; "
                f"{self.folder / 'checkpoints'} has the last good step"
            )
