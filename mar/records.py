"""The records that travel from the task files to the loss. A field means one thing for ever; nothing here imports torch."""

from dataclasses import dataclass, field

import numpy as np

TRUTHS = ("exact", "survey", "uniform", "single", "rule")


@dataclass(frozen=True)
class Gold:
    """One correct answer: its name, other accepted spellings, and its probability where the task knows it."""

    name: str
    aliases: tuple[str, ...] = ()
    probability: float | None = None


@dataclass(frozen=True)
class Example:
    """One question.

    `truth` says where the golds come from: `exact` (the true posterior, in `Gold.probability`), `survey` (shares of people), `uniform` (each gold
    equally right), `single` (one gold), `rule` (a program decides). `drawn` is the index of the gold that was drawn as this item's
    label where the golds form a distribution, else None. `multi_label`: several golds may be right at once.
    `stratum` names the part of the data that it belongs to where a task has several (how much of the evidence was removed, say).
    """

    id: str
    task: str
    question: str
    golds: tuple[Gold, ...]
    truth: str = "single"
    multi_label: bool = False
    drawn: int | None = None
    stratum: str = ""
    tests: tuple[
        str, ...
    ] = ()  # where programs are the answers: assertions, and set-up code for them

    def targets(self) -> tuple[Gold, ...]:
        """The golds that the reward pays for: the drawn label where there is one, else all of them."""
        return self.golds if self.label is None else (self.golds[self.label],)


@dataclass(frozen=True)
class Prompt:
    """What the model reads. `think_open`: the chat template has already opened `<think>` for the completion."""

    example: Example
    text: str
    ids: tuple[int, ...]
    think_open: bool = False

    @property
    def id(self) -> str:
        return self.example.id


@dataclass(frozen=True)
class Completion:
    """What the model wrote, stop token included. One entry of each array per token.

    `sampler_logprobs` belong to the distribution that was drawn from, `full_logprobs` to temperature alone. `finish_reason`: `stop` (a stop token,
    the last one), `stop_string` or `length`. `inserted`: the tokens [start, end) that the sampler put in (sampler.think_budget), not trained on.
    """

    sample_index: int
    ids: np.ndarray  # [R] int64
    sampler_logprobs: np.ndarray  # [R] float32, of a float64 model float64
    full_logprobs: np.ndarray  # [R] likewise
    finish_reason: str
    inserted: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Rollout:
    """A prompt, one completion, and what it earned. `components` are weighted by the spec's weights and sum to `total` (rewards.py)."""

    prompt: Prompt
    completion: Completion
    text: str
    answers: tuple[str | None, ...]  # [K]
    confidences: tuple[float | None, ...]  # [K]
    hits: tuple[float, ...]  # [K] y_k, before any gate
    repeated: tuple[bool, ...]  # [K] says again what an earlier slot said
    reason: str | None  # why the format failed, None if it is right
    components: np.ndarray  # [C] float64
    segment_ids: np.ndarray  # [R] int64
    total: float
    parts: dict[str, float] = field(default_factory=dict)  # named reward terms, for the log
    token_starts: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [R] where in `text` each token begins
    keys: tuple[
        str | None, ...
    ] = ()  # [K] equal for answers that are the same, where these are programs
    unjudged: int = 0  # answers whose check broke down: the completion is left out, not paid 0
