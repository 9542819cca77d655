"""The lines of `completions.jsonl`: what the policy wrote, what it earned, and why."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from mar.records import Rollout


def completion_row(
    rollout: Rollout, stage: str, step: int, advantages: Sequence[float] | None = None
) -> dict[str, Any]:
    """One line. advantages [>= R]: one per token; kept as `constant_runs`."""
    prompt = rollout.prompt
    completion = rollout.completion
    row = {
        "step": step,
        "stage": stage,
        "task": prompt.example.task,
        "id": prompt.id,
        "sample": completion.sample_index,
        "question": prompt.example.question,
        "targets": [gold.name for gold in prompt.example.targets()],
        "text": rollout.text,
        "answers": rollout.answers,
        "confidences": rollout.confidences,
        "hits": rollout.hits,
        "repeated": rollout.repeated,
        "reason": rollout.reason,
        "reward": rollout.total,
        "parts": rollout.parts,
        "components": rollout.components.tolist(),
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.ids),
        "inserted": completion.inserted,
    }
    if advantages is not None:
        row["advantages"] = constant_runs(rollout.token_starts.tolist(), advantages)
    return row


def constant_runs(starts: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """[[first character, value], ...] of each run of tokens with the same value, to three digits.

    An advantage is constant over a segment, so this is a short list.
    """
    rounded = [float(f"{value:.3g}") for value in values]
    tokens = zip(starts, rounded, strict=False)
    runs = []
    for value, run in groupby(tokens, key=itemgetter(1)):
        first_start, _ = next(run)
        runs.append([int(first_start), value])
    return runs
