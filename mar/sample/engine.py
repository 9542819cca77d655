"""Our sampler: continuous batching over fixed row slots, with each prompt computed once.

Completions wait until a row slot is free, run in it token by token, and make room for the next once
they are found to be done: at every step, or every RETIRE_EVERY steps where looking costs time. The
rows of a group share their prompt's keys and values. No draw depends on the slot, the batch or the
time (draws.py).

Read `generate` first, then `CompletionState`, then the four steps of `Engine`.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mar.answers.grammar import decode_with_starts
from mar.errors import UserError
from mar.policy.model import Decoder, precise_product, project, reorder_weight
from mar.policy.packing import chunks
from mar.records import Completion
from mar.sample.draws import DrawnTokens, SamplingParams, draw_tokens, uniforms
from mar.sample.kv_cache import KVCache, PackedPrompt, capacity
from mar.sample.rows import Rows
from mar_kernels.graphs import Graphs

# token ids to text
Decode = Callable[[tuple[int, ...]], str]

# starts what a CUDA graph has recorded
Replay = Callable[[], object]

# gets the index of a request and one of its completions, once that is found to be done
OnDone = Callable[[int, Completion], None]

# Looking for finished rows waits for the device. Where that costs time, look every so many steps.
RETIRE_EVERY = 8

# prompts are computed this many tokens at a time: bounds the activations, and on a CPU they stay
# in the caches
PREFILL_TOKENS = 4096

# devices on which draws and decode steps are captured and replayed
GRAPHED = ("cuda",)

# how mar_kernels takes what decode steps have kernels for
BACKEND = "auto"

# A decode step is captured for widths (longest completion so far) rounded up to a multiple of this.
# A larger multiple means fewer captures, and more masked entries to read in each step.
GRAPH_WIDTH = 128

# when nothing waits any more, free slots are dropped once fewer than this share are in use
WORTH_SHRINKING = 7 / 8

# The row slot of a completion that is not running, and the prompt slot of a prompt that is not in
# the cache.
NO_SLOT = -1


@dataclass(frozen=True)
class Request:
    """One prompt and its completions.

    Each completion has a stream of random draws (`keys`, see draws.stream_key) and, where `limits`
    are given, a `max_tokens` of its own.
    """

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        one_limit_per_key = not self.limits or len(self.limits) == len(self.keys)
        if not self.prompt_ids or not one_limit_per_key or min(self.limits, default=1) < 1:
            raise ValueError(
                "a prompt is empty, or its limits are not one number above 0 for each key"
            )


@dataclass(frozen=True)
class Generation:
    """The completions of every request, one per key, and how it went."""

    groups: list[list[Completion]]
    num_steps: int
    # share of row slots in use while completions waited for one; None: none ever waited
    occupancy: float | None
    kv_bytes: int


def decode_step(
    model: Decoder, cache: KVCache, tokens: Int64[Tensor, " B"], width: int
) -> Float[Tensor, "B D"]:
    """Feed one token to every row slot; returns the hidden states after it.

    A function of static buffers, fit for a CUDA graph: no branch depends on a tensor's values.
    """
    positions = cache.prompt_lengths[cache.row_prompt] + cache.own_lengths
    return model.hidden(tokens, positions, cache.decode_attend(width, BACKEND))


@torch.inference_mode()
def generate(
    model: Decoder,
    requests: Sequence[Request],
    params: SamplingParams,
    kv_budget_tokens: int,
    decode: Decode | None = None,
    on_done: OnDone | None = None,
) -> Generation:
    """Sample the completions of every request.

    `decode` is needed where `params` has stop strings or a thinking budget. `on_done` is called
    with each completion once it is found to be done.

    Each round draws before it feeds: a prompt's last hidden state predicts the first token.

    Raises UserError where a group does not fit the budget, or probabilities are not finite;
    ValueError where `decode` is needed and missing.
    """
    if params.reads_text and decode is None:
        raise ValueError("stop_strings and think_budget read text: they need decode")
    if not requests:
        return Generation(groups=[], num_steps=0, occupancy=None, kv_bytes=0)
    engine = Engine(
        model=model,
        requests=requests,
        params=params,
        kv_budget_tokens=kv_budget_tokens,
        decode=decode,
        on_done=on_done,
    )
    try:
        with model.for_sampling(BACKEND):
            while engine.waiting or engine.running:
                engine.admit()
                engine.draw()
                engine.retire()
                engine.feed()
    finally:
        # also where an error's traceback keeps the engine
        engine.forget_graphs()
    return engine.result()


class Status(Enum):
    WAITING = auto()  # for a row slot
    RUNNING = auto()  # in a row slot, one more token each step
    DONE = auto()  # its result is there, its row slot free again


@dataclass(eq=False)
class PromptState:
    """A request and its completions. It holds a prompt slot while any of them is running."""

    index: int
    request: Request
    slot: int = NO_SLOT
    completions: list["CompletionState"] = field(default_factory=list)
    num_unfinished: int = 0


@dataclass(eq=False)
class CompletionState:
    """One completion, from its request to its result."""

    prompt: PromptState
    sample_index: int
    stream_key: int
    limit: int
    status: Status = Status.WAITING
    row: int = NO_SLOT  # its row slot while it runs
    entered: int = -1  # the step at which it got that slot
    result: Completion | None = None

    def enter(self, row: int, step: int) -> None:
        self.status = Status.RUNNING
        self.row = row
        self.entered = step

    def finish(self, result: Completion) -> None:
        self.status = Status.DONE
        self.row = NO_SLOT
        self.result = result
        self.prompt.num_unfinished -= 1


class Engine:
    """The state of one `generate`: the host knows which completion is where (`waiting`, `running`,
    free slots), the device holds everything per token (`rows`, `cache`)."""

    def __init__(
        self,
        model: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        kv_budget_tokens: int,
        decode: Decode | None = None,
        on_done: OnDone | None = None,
    ) -> None:
        self.model = model
        self.params = params
        self.decode = decode
        self.on_done = on_done

        self.prompts = [_prompt_state(i, r, params) for i, r in enumerate(requests)]
        self.completions = [c for prompt in self.prompts for c in prompt.completions]
        self.waiting = deque(self.completions)
        # in the order in which they entered: the first is the oldest
        self.running: list[CompletionState] = []
        self.num_steps = 0
        # the last step at which completions waited
        self.waited_until = 0

        prompt_lengths = [len(request.prompt_ids) for request in requests]
        group_sizes = [len(request.keys) for request in requests]
        self.largest_group = max(group_sizes)
        num_prompt_slots, num_rows = capacity(
            prompt_lengths, group_sizes, params.max_tokens, kv_budget_tokens
        )
        self.num_rows = num_rows
        self.free_prompt_slots = deque(range(num_prompt_slots))
        self.free_rows = deque(range(num_rows))

        head_weight = model.head_weight
        self.device = head_weight.device
        self.head_weight = head_weight
        self.reordered_head = reorder_weight(head_weight)
        self.cache = KVCache.allocate(
            config=model.config,
            num_prompts=num_prompt_slots,
            prompt_tokens=max(prompt_lengths),
            num_rows=num_rows,
            row_tokens=params.max_tokens,
            like=head_weight,
        )
        self.kv_bytes = self.cache.num_bytes
        self.rows = Rows.allocate(num_rows, params.max_tokens, like=head_weight)
        # [P, D]: the state after each prompt, from which all its rows draw first
        self.prompt_hidden = head_weight.new_zeros(num_prompt_slots, head_weight.shape[1])
        self.stop_ids = torch.tensor(params.stop_ids, dtype=torch.int64, device=self.device)
        self.think_close = torch.tensor(params.think_close, dtype=torch.int64, device=self.device)
        # decode steps by their width
        self.captured_steps: dict[int, Replay] = {}
        self.captured_draw: Replay | None = None
        self.graphs = Graphs()

        looks_are_free = self.device.type == "cpu" and not params.stop_strings
        self.retire_every = 1 if looks_are_free else RETIRE_EVERY

    # admit: waiting -> running

    def admit(self) -> None:
        """Let waiting completions into free row slots, in order, and compute their prompts."""
        if not self.waiting:
            return
        self.waited_until = self.num_steps
        entering, new_prompts = self.take_slots()
        if not entering:
            return
        lengths = [len(prompt.request.prompt_ids) for prompt in new_prompts]
        for chunk in chunks(new_prompts, lengths, PREFILL_TOKENS):
            self.prefill(chunk)
        self.assign_rows()
        rows = torch.tensor([c.row for c in entering], device=self.device)
        self.cache.own_lengths[rows] = 0
        self.rows.enter(
            rows=rows,
            stream_keys=torch.tensor([c.stream_key for c in entering], device=self.device),
            limits=torch.tensor([c.limit for c in entering], device=self.device),
            hidden=self.prompt_hidden[self.cache.row_prompt[rows]],
        )

    def take_slots(self) -> tuple[list[CompletionState], list[PromptState]]:
        """Hand out slots; returns the completions that enter, and prompts that are new."""
        entering: list[CompletionState] = []
        new_prompts: list[PromptState] = []
        while self.waiting and self.free_rows:
            prompt = self.waiting[0].prompt
            if prompt.slot == NO_SLOT:
                if not self.free_prompt_slots:
                    break
                prompt.slot = self.free_prompt_slots.popleft()
                new_prompts.append(prompt)
            completion = self.waiting.popleft()
            completion.enter(self.free_rows.popleft(), self.num_steps)
            entering.append(completion)
        self.running += entering
        return entering, new_prompts

    def prefill(self, prompts: Sequence[PromptState]) -> None:
        """Compute these prompts into their slots; keep the hidden state after each."""
        ids: list[int] = []
        slots: list[int] = []
        packed: list[PackedPrompt] = []
        for prompt in prompts:
            prompt_ids = prompt.request.prompt_ids
            packed.append(PackedPrompt(len(ids), len(prompt_ids), prompt.slot))
            slots.append(prompt.slot)
            ids += prompt_ids
        lengths = torch.tensor([p.length for p in packed], device=self.device)
        last = torch.tensor([p.start + p.length - 1 for p in packed], device=self.device)
        positions = torch.cat([torch.arange(p.length) for p in packed]).to(self.device)
        hidden = self.model.hidden(
            torch.tensor(ids, device=self.device), positions, self.cache.prefill_attend(packed)
        )
        self.prompt_hidden[slots] = hidden[last]
        self.cache.prompt_lengths[slots] = lengths

    def assign_rows(self) -> None:
        """Tell the cache which prompt each row reads."""
        row_prompt = [NO_SLOT] * len(self.rows)
        for completion in self.running:
            row_prompt[completion.row] = completion.prompt.slot
        self.cache.assign(row_prompt, self.largest_group)

    # draw: one token of every row

    def draw(self) -> None:
        """Draw one token of every row, and record it."""
        if self.params.think_budget is not None:
            self.close_thoughts(self.params.think_budget)
        replay = self.replay_of_draw()
        if replay is None:
            self.draw_and_record()
        else:
            replay()
        self.num_steps += 1

    def draw_and_record(self) -> None:
        """What `draw` does on the device: like `decode_step`, fit for a CUDA graph.

        Done twice it is the same as once: draws depend on their identity alone.
        """
        rows = self.rows
        positions = self.cache.own_lengths
        logits = self.logits(rows.hidden)
        uniform = uniforms(rows.stream_keys, positions)
        drawn = draw_tokens(logits, uniform, self.params.temperature, self.params.truncation)
        if len(self.think_close):
            drawn = self.put_in_think_close(drawn, logits, positions)
        rows.record(positions, drawn, self.stop_ids)

    def logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """In float32 or wider, as the trainer's log-probabilities are computed."""
        if self.reordered_head is not None:
            return project(hidden, self.head_weight, None, self.reordered_head)
        return precise_product(hidden, self.head_weight.T)

    def num_drawn(self, completion: CompletionState) -> int:
        """Tokens that its row has drawn; a row that is done still draws until it is taken out."""
        return self.num_steps - completion.entered

    def close_thoughts(self, think_budget: int) -> None:
        """Rows that reach their budget, and still think, get `think_close` as their next tokens."""
        assert self.decode is not None
        for completion in self.running:
            if self.num_drawn(completion) != think_budget:
                continue
            ids = self.rows.tokens[completion.row, :think_budget].tolist()
            if "</think>" not in self.decode(tuple(ids)):
                self.rows.insert_from[completion.row] = think_budget

    def put_in_think_close(
        self, drawn: DrawnTokens, logits: Float[Tensor, "B V"], positions: Int64[Tensor, " B"]
    ) -> DrawnTokens:
        """Replace the draws of rows that are inside `think_close`. Its tokens are certain."""
        offset = positions - self.rows.insert_from
        last = len(self.think_close) - 1
        inside = (offset >= 0) & (offset <= last)
        tokens = torch.where(inside, self.think_close[offset.clamp(0, last)], drawn.tokens)
        logprobs = torch.log_softmax(logits / (self.params.temperature or 1.0), -1)
        full_logprobs = logprobs.gather(1, tokens[:, None])[:, 0]
        return DrawnTokens(
            tokens=tokens,
            sampler_logprobs=torch.where(inside, 0.0, drawn.sampler_logprobs),
            full_logprobs=torch.where(inside, full_logprobs, drawn.full_logprobs),
        )

    # retire: running -> done

    def retire(self) -> None:
        """Take out the rows that are done; drop free slots when nothing waits for them."""
        if self.num_steps % self.retire_every != 0:
            return
        if self.params.stop_strings:
            self.find_stop_strings()
        done = self.rows.done.tolist()
        finished = [c for c in self.running if done[c.row]]
        if not finished:
            return
        finished.sort(key=lambda completion: completion.row)
        self.running = [c for c in self.running if not done[c.row]]
        self.free_rows = deque(sorted([*self.free_rows, *(c.row for c in finished)]))
        self.collect(finished)
        num_running = len(self.running)
        if not self.waiting and 0 < num_running < WORTH_SHRINKING * len(self.rows):
            self.shrink()

    def find_stop_strings(self) -> None:
        """End rows at the token that completes a stop string.

        Only text that is new since the last look is read, and as much before it as a stop string
        can reach back.
        """
        assert self.decode is not None
        # a character has at most four tokens
        reach = self.retire_every + 4 * max(map(len, self.params.stop_strings))
        for completion in self.running:
            row = completion.row
            end = min(self.num_drawn(completion), int(self.rows.lengths[row]))
            start = max(0, end - reach)
            ids = self.rows.tokens[row, start:end].tolist()
            needed = _tokens_to_a_stop_string(ids, self.params.stop_strings, self.decode)
            if needed is None:
                continue
            length = start + needed
            # a stop token that also completes a stop string stays a stop token
            if length < end or not self.rows.stopped[row]:
                self.rows.end_at_stop_string(row, length)

    def collect(self, finished: Sequence[CompletionState]) -> None:
        """Read what these rows have written, hand it over, and free prompts without rows."""
        rows = torch.tensor([c.row for c in finished], device=self.device)
        written = self.rows.select(rows).cpu()
        for i, completion in enumerate(finished):
            result = written.completion(i, completion.sample_index, len(self.think_close))
            completion.finish(result)
            prompt = completion.prompt
            if self.on_done is not None:
                self.on_done(prompt.index, result)
            if prompt.num_unfinished == 0:
                self.free_prompt_slots.append(prompt.slot)
                prompt.slot = NO_SLOT

    def shrink(self) -> None:
        """Keep only the slots in use, in new buffers: nothing waits, so no slot is taken again."""
        # they read the old buffers
        self.forget_graphs()
        completions = sorted(self.running, key=lambda completion: completion.row)
        prompts = sorted({c.prompt for c in self.running}, key=lambda prompt: prompt.slot)
        rows = torch.tensor([c.row for c in completions], device=self.device)
        slots = torch.tensor([p.slot for p in prompts], device=self.device)
        self.cache.keep(rows, slots)
        self.rows = self.rows.select(rows)
        self.free_rows.clear()
        self.free_prompt_slots.clear()
        for row, completion in enumerate(completions):
            completion.row = row
        for slot, prompt in enumerate(prompts):
            prompt.slot = slot
        self.largest_group = max(Counter(c.prompt for c in self.running).values())
        self.assign_rows()

    # feed: the drawn tokens through the model

    def feed(self) -> None:
        """Feed the drawn tokens; the next ones are drawn from the hidden states after them."""
        if not self.running:
            return
        cache = self.cache
        oldest = self.running[0]
        width = min(self.num_drawn(oldest), self.params.max_tokens)
        # Rows that are done go on until they are retired, and free slots always do: they must not
        # write past the cache, so they write over their last entry.
        cache.own_lengths.clamp_(max=width - 1)
        replay = self.replay_of_step(width)
        if replay is None:
            self.rows.hidden = decode_step(self.model, cache, self.rows.last_tokens, width)
        else:
            replay()
        cache.own_lengths += 1

    # CUDA graphs of both

    def replay_of_draw(self) -> Replay | None:
        """`draw_and_record` as a CUDA graph. None where there are no graphs, or a capture has
        failed: then it runs as it is.
        """
        if self.device.type not in GRAPHED or self.graphs.failed:
            return None
        if self.captured_draw is None:
            self.captured_draw = self.graphs.capture(self.draw_and_record)
        return self.captured_draw

    def replay_of_step(self, width: int) -> Replay | None:
        """`decode_step` as a CUDA graph, captured once for each multiple of GRAPH_WIDTH. None as
        above.
        """
        if self.device.type not in GRAPHED or self.graphs.failed:
            return None
        multiple = -(-width // GRAPH_WIDTH) * GRAPH_WIDTH
        width = min(multiple, self.params.max_tokens)
        if width not in self.captured_steps:
            rows = self.rows

            def work() -> Tensor:
                hidden = decode_step(self.model, self.cache, rows.last_tokens, width)
                return rows.hidden.copy_(hidden)

            replay = self.graphs.capture(work)
            if replay is None:
                # the others read and write a buffer of hidden states that is given up now
                self.forget_graphs()
                return None
            self.captured_steps[width] = replay
        return self.captured_steps[width]

    def forget_graphs(self) -> None:
        self.captured_steps.clear()
        self.captured_draw = None

    # the end

    def result(self) -> Generation:
        """Everything, in the order of the requests."""
        groups = [[_result_of(c) for c in prompt.completions] for prompt in self.prompts]
        for group in groups:
            if not all(np.isfinite(completion.full_logprobs).all() for completion in group):
                raise UserError(
                    "the model's probabilities are not finite numbers: "
                    "weights are damaged, or training diverged (lower optim.lr)"
                )
        return Generation(
            groups=groups,
            num_steps=self.num_steps,
            occupancy=self.occupancy(),
            kv_bytes=self.kv_bytes,
        )

    def occupancy(self) -> float | None:
        """The share of row slots in use while completions waited; None: none ever waited."""
        offered = self.num_rows * self.waited_until
        if not offered:
            return None
        used = 0
        for completion in self.completions:
            left = completion.entered + len(_result_of(completion).ids)
            used += max(min(left, self.waited_until) - completion.entered, 0)
        return used / offered


def _prompt_state(index: int, request: Request, params: SamplingParams) -> PromptState:
    """A request with all its completions waiting."""
    prompt = PromptState(index, request, num_unfinished=len(request.keys))
    limits = request.limits or (params.max_tokens,) * len(request.keys)
    for sample_index, (stream_key, limit) in enumerate(zip(request.keys, limits, strict=True)):
        prompt.completions.append(
            CompletionState(
                prompt=prompt,
                sample_index=sample_index,
                stream_key=stream_key,
                limit=min(limit, params.max_tokens),
            )
        )
    return prompt


def _result_of(completion: CompletionState) -> Completion:
    assert completion.result is not None
    return completion.result


def _tokens_to_a_stop_string(
    ids: Sequence[int], stop_strings: Sequence[str], decode: Decode
) -> int | None:
    """How many of the tokens it takes to complete the first stop string; None: there is none."""
    text, starts = decode_with_starts(ids, decode)
    ends = [text.find(stop) + len(stop) for stop in stop_strings if stop in text]
    if not ends:
        return None
    token_ends = np.append(starts[1:-1], len(text))
    return int(np.searchsorted(token_ends, min(ends))) + 1
