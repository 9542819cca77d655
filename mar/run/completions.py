"""run.completions."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from mar.records import Rollout


def runs_of(starts: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """[[first character, value], ...] of each run of tokens with one value, to three digits: an advantage is constant over a segment."""
    tokens = zip(starts, (float(f"{v:.3g}") for v in values), strict=False)
    return [[int(next(run)[0]), value] for value, run in groupby(tokens, key=itemgetter(1))]


def completion_row(
    rollout: Rollout, stage: str, step: int, advantages: Sequence[float] | None = None
) -> dict[str, Any]:
    """One line of `completions.jsonl`. advantages [>= R]: one per token, kept as `runs_of` them."""
    example = rollout.prompt.example
    return {
        "step": step,
        "stage": stage,
        "task": example.task,
        "id": example.id,
        "sample": rollout.completion.sample_index,
        "question": example.question,
        "targets": [gold.name for gold in example.targets()],
        **{
            name: getattr(rollout, name)
            for name in ("text", "answers", "confidences", "hits", "repeated", "reason")
        },
        "reward": rollout.total,
        "parts": rollout.parts,
        "components": rollout.components.tolist(),
        "finish_reason": rollout.completion.finish_reason,
        "num_tokens": len(rollout.completion.ids),
        "inserted": rollout.completion.inserted,
        **(
            {}
            if advantages is None
            else {"advantages": runs_of(rollout.token_starts.tolist(), advantages)}
        ),
    }
