"""What travels through the program: Example -> Prompt -> Completion -> Rollout. Read this first.

A task file gives an `Example` (a question and its correct answers). The chat template makes it a
`Prompt`. The sampler writes a group of `Completion`s to it. Reading and judging them gives
`Rollout`s, whose rewards the loss learns from. A field keeps its meaning everywhere, and nothing
here imports torch.

Letters for dimensions, the same in all comments, docstrings and tensor shapes:

    P  prompts of a step
    G  group_size: completions of a prompt
    K  num_answers: answers in a completion
    B  rows: completions, P x G of a whole step
    T  tokens of a completion; in a batch those of the longest one
    M  tokens that are trained, of all rows together
    N  packed tokens: each prompt once, its completions behind it
    V  vocabulary
    D  width of the model
    L  layers
    H  attention heads
    C  components of a reward
    S  segments of a completion: one for each element of the grammar, and one for what follows
"""

from dataclasses import dataclass, field

import numpy as np

TRUTHS = ("exact", "survey", "uniform", "single", "rule")


@dataclass(frozen=True)
class Gold:
    """One correct answer."""

    name: str
    # other accepted spellings
    aliases: tuple[str, ...] = ()
    # of being the right answer, where the task knows it
    probability: float | None = None


@dataclass(frozen=True)
class Example:
    """One question, and what is known about its correct answers."""

    id: str
    task: str
    question: str
    golds: tuple[Gold, ...]

    # where the golds come from:
    #   exact    the true posterior, in `Gold.probability`
    #   survey   shares of the people who were asked, likewise
    #   uniform  each gold is equally right
    #   single   there is one gold
    #   rule     a program decides, there are no golds
    truth: str = "single"

    # several golds may be right at the same time
    multi_label: bool = False

    # where the golds are a distribution: the index of the one that was drawn as this item's label
    label: int | None = None

    # the part of the data that the example belongs to, where a task reports on parts
    stratum: str = ""

    # where the answers are programs: assertions, and set-up code for them
    tests: tuple[str, ...] = ()

    def targets(self) -> tuple[Gold, ...]:
        """The golds that the reward pays for: the label where one was drawn, else all of them."""
        if self.label is None:
            return self.golds
        return (self.golds[self.label],)


@dataclass(frozen=True)
class Prompt:
    """What the model reads: the question and the request, in the model's chat template."""

    example: Example
    text: str
    # [number of tokens] `text` as tokens: any sequence is kept as int32
    ids: np.ndarray = field(compare=False)
    # the chat template has already written `<think>`, so that the completion begins inside it
    think_open: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.int32))

    @property
    def id(self) -> str:
        return self.example.id


@dataclass(frozen=True)
class Completion:
    """What the model wrote to a prompt: T tokens, the stop token included."""

    # which of the G completions of its prompt
    sample_index: int

    # [T] int64
    ids: np.ndarray

    # [T] log-probability of each token in the distribution that it was drawn from (temperature and
    # top-k, top-p, min-p). float32; float64 of a float64 model
    sampler_logprobs: np.ndarray

    # [T] likewise with the temperature alone: what the trainer computes again
    full_logprobs: np.ndarray

    # `stop` (the last token is a stop token), `stop_string` or `length`
    finish_reason: str

    # the tokens [start, end) that the sampler put in itself (`sampler.think_budget`); not trained
    inserted: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Rollout:
    """A prompt, one completion, the answers in it, and what they earned."""

    prompt: Prompt
    completion: Completion
    # the completion without its stop token
    text: str

    # [K] what was written in each answer slot; None where nothing was, or nothing readable
    answers: tuple[str | None, ...]
    confidences: tuple[float | None, ...]

    # [K] y_k: 1 where answer k takes a gold that no earlier answer took (or the probability of it,
    # `data.target=probabilities`), else 0. As judged: gates of the reward do not change it
    hits: tuple[float, ...]

    # [K] the answer says again what an earlier one said
    repeated: tuple[bool, ...]

    # why the text fails the format (`mar.answers.grammar.parse`); None where it is right
    reason: str | None

    # [C] float64: the reward in the order in which the text decides it (`mar.answers.rewards`),
    # weights included. Their sum is `total`
    components: np.ndarray

    # [T] int64: the segment that each token belongs to
    segment_ids: np.ndarray

    # the reward of the completion
    total: float

    # the same reward by name, and counts, for the log
    parts: dict[str, float] = field(default_factory=dict)

    # [T] int64: the character of `text` at which each token begins
    token_starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    # [K] what an answer is worth in the metrics: the exact probability of its gold where the task
    # knows it, else the hit
    mass: tuple[float, ...] = ()

    # [K] equal for answers that mean the same. Programs: for those that differ in nothing but names
    keys: tuple[str | None, ...] = ()

    # [K] the golds, by index, that each answer can be: of all golds where `mass` is exact, else of
    # the targets
    fits: tuple[tuple[int, ...], ...] = ()

    # number of answers whose check broke down. If any did, the completion is left out of the
    # update: to pay it 0 would be wrong
    unjudged: int = 0

    # [terms, C] float64: the components of each term of the reward, per unit of its weight, and
    # [terms] the weights. `components` are the weighted sum
    terms: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    term_weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
