"""Our sampler: rows and prompts live in fixed slots of one KV cache; a row that stops makes room for the next at once.

Each prompt is computed once, for all rows of its group, whenever they run. No draw depends on the slot, the batch or the time: see draw.py.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mar.answers.grammar import decode_with_starts
from mar.errors import UserError
from mar.policy.attention import chunks
from mar.policy.model import Decoder, project, reorder_weight
from mar.sample.draws import SamplingParams, draw_tokens, uniforms
from mar.sample.kv_cache import KVCache, capacity
from mar_kernels.graphs import capture

RETIRE_EVERY = 8  # steps between two looks for finished rows where a look waits for the device

PREFILL_TOKENS = 4096  # prompts are computed this many tokens at a time: no larger activations, and on a CPU they stay near the caches

GRAPHED = ("cuda",)  # devices on which decode steps are captured and replayed

GRAPH_WIDTH = (
    128  # widths that share a graph: fewer captures, for fewer than so many masked entries a row
)

WORTH_SHRINKING = (
    7 / 8
)  # with nothing left to admit, free slots are dropped when fewer than this are in use


@dataclass(frozen=True)
class Request:
    """One prompt, and for each of its completions the random stream (draw.stream_key) and, where `limits` are given, its own `max_tokens`."""

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (
            not self.prompt_ids
            or (self.limits and len(self.limits) != len(self.keys))
            or min(self.limits, default=1) < 1
        ):
            raise ValueError(
                "a prompt is empty, or its limits are not one number above 0 for each key"
            )


@dataclass(frozen=True)
class Sampled:
    """One completion: `sampler_logprobs` of the distribution drawn from, `full_logprobs` of temperature alone (1 when greedy).

    `finish_reason`: `stop` (a stop token, the last one), `stop_string` or `length`. `inserted`: the tokens [start, end) that were put in, not drawn.
    """

    ids: np.ndarray
    sampler_logprobs: np.ndarray
    full_logprobs: np.ndarray
    finish_reason: str
    inserted: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Generation:
    """Completions of every request, one per key, and how it went: decode steps, the share of row slots in use while prompts waited (None:
    none ever did), bytes of the KV cache."""

    groups: list[list[Sampled]]
    num_steps: int
    occupancy: float | None
    kv_bytes: int


def decode_step(model: Decoder, cache: KVCache, tokens: Tensor, width: int) -> Tensor:
    """Feed one token [S] to every row slot; returns the hidden states [S, d]. A function of static buffers: nothing here depends on values."""
    positions = cache.prompt_lengths[cache.row_prompt] + cache.own_lengths
    return model.hidden(tokens, positions, cache.decode_attend(width))


@torch.inference_mode()
def generate(
    model: Decoder, requests: Sequence[Request], params: SamplingParams, kv_budget_tokens: int
) -> Generation:
    """Sample every request. Raises UserError where a group does not fit the budget."""
    if not requests:
        return Generation([], 0, None, 0)
    slots = _Slots(model, requests, params, kv_budget_tokens)
    with model.reordered_weights():
        while slots.waiting or (slots.held >= 0).any():
            slots.admit()
            tokens = slots.draw()
            if slots.num_steps % slots.retire_every == 0:
                slots.retire()
            if (slots.held >= 0).any():
                slots.feed(tokens)
    return slots.result()


class _Slots:
    """The state of one `generate`. Host side: which completion each row slot holds and how old it is. Device side: everything per token."""

    def __init__(
        self, model: Decoder, requests: Sequence[Request], params: SamplingParams, budget: int
    ) -> None:
        weight, lengths, sizes = (
            model.head_weight,
            [len(r.prompt_ids) for r in requests],
            [len(r.keys) for r in requests],
        )
        self.model, self.requests, self.params, self.device = model, requests, params, weight.device
        self.largest_group = max(sizes)
        num_prompts, num_rows = capacity(lengths, sizes, params.max_tokens, budget)
        self.num_rows = num_rows
        self.cache = KVCache.allocate(
            model.config, num_prompts, max(lengths), num_rows, params.max_tokens, weight
        )
        self.kv_bytes = self.cache.num_bytes
        self.retire_every = (
            1 if self.device.type == "cpu" and not params.stop_strings else RETIRE_EVERY
        )
        self.num_steps, self.waited_until = 0, 0
        self.graphs: dict[
            int, tuple[Tensor, Callable[[], object]]
        ] = {}  # by width: the tokens it reads, its replay

        owner = [i for i, r in enumerate(requests) for _ in r.keys]
        self.owner, self.keys = owner, [key for r in requests for key in r.keys]
        limits = [
            limit for r in requests for limit in r.limits or (params.max_tokens,) * len(r.keys)
        ]
        self.limits = np.minimum(np.array(limits, dtype=np.int64), params.max_tokens)
        self.waiting = deque(range(len(owner)))
        self.entered = np.zeros(
            len(owner), dtype=np.int64
        )  # the step at which a completion got its slot
        self.results: list[Sampled | None] = [None] * len(owner)
        self.unfinished = list(sizes)
        self.free_prompts, self.slot_of = deque(range(num_prompts)), dict[int, int]()
        self.held = np.full(num_rows, -1)  # the completion in each row slot, -1: free
        self.ages = np.zeros(num_rows, dtype=np.int64)  # tokens drawn

        size, precise = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
        self.stops = torch.tensor(params.stop_ids, dtype=torch.int64, device=self.device)
        self.close = torch.tensor(params.think_close, dtype=torch.int64, device=self.device)
        self.head = (weight, None, reorder_weight(weight))
        self.prompt_hidden = weight.new_zeros(num_prompts, size)
        self.rows = {  # one entry per row slot; column R of the [S, R + 1] ones takes what a finished row still writes
            "key": torch.zeros(num_rows, dtype=torch.int64, device=self.device),
            "hidden": weight.new_zeros(num_rows, size),
            "length": torch.zeros(num_rows, dtype=torch.int64, device=self.device),
            "stopped": torch.zeros(num_rows, dtype=torch.bool, device=self.device),
            "stop_string": torch.zeros(num_rows, dtype=torch.bool, device=self.device),
            "done": torch.ones(num_rows, dtype=torch.bool, device=self.device),
            "insert_at": torch.full((num_rows,), params.max_tokens, device=self.device),
            "tokens": torch.zeros(
                num_rows, params.max_tokens + 1, dtype=torch.int64, device=self.device
            ),
            "drawn": torch.zeros(
                num_rows, params.max_tokens + 1, dtype=precise, device=self.device
            ),
            "full": torch.zeros(num_rows, params.max_tokens + 1, dtype=precise, device=self.device),
        }

    def admit(self) -> None:
        """Fill free row slots with waiting completions, in order; a prompt is computed when its first row enters."""
        if self.waiting:
            self.waited_until = self.num_steps
        free, placed, prompts = deque(np.flatnonzero(self.held < 0).tolist()), [], []
        while self.waiting and free:
            request = self.owner[self.waiting[0]]
            if request not in self.slot_of:
                if not self.free_prompts:
                    break
                self.slot_of[request] = self.free_prompts.popleft()
                prompts.append(request)
            placed.append(free.popleft())
            self.held[placed[-1]] = self.waiting.popleft()
        self.entered[self.held[placed]] = self.num_steps
        if not placed:
            return
        for chunk in chunks(
            prompts, [len(self.requests[i].prompt_ids) for i in prompts], PREFILL_TOKENS
        ):
            self.prefill(chunk)
        self.ages[placed] = 0
        self.reassign()
        at = torch.tensor(placed, device=self.device)
        keys = [self.keys[i] for i in self.held[placed]]
        self.cache.own_lengths[at] = 0
        limits = torch.from_numpy(self.limits[self.held[placed]]).to(self.device)
        values: dict[str, Any] = {"key": torch.tensor(keys, device=self.device), "length": limits}
        values |= {
            "hidden": self.prompt_hidden[self.cache.row_prompt[at]],
            "insert_at": self.params.max_tokens,
        }
        for name, value in {
            **values,
            "stopped": False,
            "stop_string": False,
            "done": False,
        }.items():
            self.rows[name][at] = value

    def prefill(self, chosen: Sequence[int]) -> None:
        """Compute these requests' prompts into their slots; keep the hidden state after each, from which all its rows draw first."""
        slots, lengths = (
            [self.slot_of[i] for i in chosen],
            [len(self.requests[i].prompt_ids) for i in chosen],
        )
        starts = np.cumsum([0, *lengths[:-1]])
        ids = torch.tensor(
            [token for i in chosen for token in self.requests[i].prompt_ids], device=self.device
        )
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        attend = self.cache.prefill_attend(list(zip(starts.tolist(), lengths, slots, strict=True)))
        last = torch.tensor(starts + np.array(lengths) - 1, device=self.device)
        self.prompt_hidden[slots] = self.model.hidden(ids, positions, attend)[last]
        self.cache.prompt_lengths[slots] = torch.tensor(lengths, device=self.device)

    def draw(self) -> Tensor:
        """Draw and record one token of every row [S]."""
        rows, params, at = self.rows, self.params, self.cache.own_lengths
        if params.think_budget is not None:
            self.close_thoughts(
                np.flatnonzero((self.held >= 0) & (self.ages == params.think_budget)).tolist()
            )
        logits = project(rows["hidden"], *self.head).to(rows["full"].dtype)
        token, drawn, full = draw_tokens(
            logits, uniforms(rows["key"], at), params.temperature, params.truncation
        )
        if len(self.close):
            into = at - rows["insert_at"]
            inside = (into >= 0) & (into < len(self.close))
            token = torch.where(inside, self.close[into.clamp(0, len(self.close) - 1)], token)
            fixed = torch.log_softmax(logits / (params.temperature or 1.0), -1).gather(
                1, token[:, None]
            )[:, 0]
            drawn, full = torch.where(inside, 0.0, drawn), torch.where(inside, fixed, full)
        column = torch.where(rows["done"], params.max_tokens, at)[:, None]
        for name, value in (("tokens", token), ("drawn", drawn), ("full", full)):
            rows[name].scatter_(1, column, value[:, None])
        ends = torch.isin(token, self.stops) & ~rows["done"]
        rows["length"].copy_(torch.where(ends, at + 1, rows["length"]))
        rows["stopped"] |= ends
        rows["done"] |= ends | (at + 1 >= rows["length"])
        self.num_steps += 1
        self.ages += 1
        return token

    def feed(self, tokens: Tensor) -> None:
        """The hidden states from which the next tokens are drawn."""
        cache, oldest = self.cache, int(self.ages[self.held >= 0].max(initial=1))
        if len(tokens) != len(self.held):  # slots were dropped since the draw
            tokens = self.rows["tokens"].gather(1, cache.own_lengths[:, None])[:, 0]
        width = min(oldest, self.params.max_tokens)
        # rows that are done, or slots that are free, write over their last entry
        cache.own_lengths.clamp_(max=width - 1)
        if self.device.type not in GRAPHED:
            self.rows["hidden"] = decode_step(self.model, cache, tokens, width)
        else:
            width = min(-(-width // GRAPH_WIDTH) * GRAPH_WIDTH, self.params.max_tokens)
            if width not in self.graphs:
                fed, hidden = tokens.clone(), self.rows["hidden"]
                self.graphs[width] = (
                    fed,
                    capture(lambda: hidden.copy_(decode_step(self.model, cache, fed, width))),
                )
            self.graphs[width][0].copy_(tokens)
            self.graphs[width][1]()
        cache.own_lengths += 1

    def close_thoughts(self, rows: Iterable[int]) -> None:
        """Rows at their budget: those that still think get `think_close` as their next tokens."""
        budget, decode = self.params.think_budget, self.params.decode
        assert budget is not None and decode is not None
        for row in rows:
            if "</think>" not in decode(tuple(self.rows["tokens"][row, :budget].tolist())):
                self.rows["insert_at"][row] = budget

    def retire(self) -> None:
        """Take out the rows that are done, and drop their slots when nobody waits for them."""
        if self.params.stop_strings:
            self.find_stop_strings()
        done = self.rows["done"].cpu().numpy() & (self.held >= 0)
        rows = np.flatnonzero(done).tolist()
        if not rows:
            return
        columns = ("tokens", "drawn", "full", "length", "stopped", "stop_string", "insert_at")
        tokens, drawn, full, lengths, stopped, texts, inserts = (
            self.rows[name][rows].cpu().numpy() for name in columns
        )
        for i, row in enumerate(rows):
            completion, n, start = int(self.held[row]), int(lengths[i]), int(inserts[i])
            reason = "stop_string" if texts[i] else "stop" if stopped[i] else "length"
            inserted = (start, min(start + len(self.close), n)) if start < n else (0, 0)
            columns_of_row = (tokens[i, :n].copy(), drawn[i, :n].copy(), full[i, :n].copy())
            self.results[completion] = Sampled(*columns_of_row, reason, inserted)
            if self.params.on_done:
                self.params.on_done(completion, self.results[completion])
            self.unfinished[self.owner[completion]] -= 1
            if self.unfinished[self.owner[completion]] == 0:
                self.free_prompts.append(self.slot_of.pop(self.owner[completion]))
        self.held[rows] = -1
        live = np.flatnonzero(self.held >= 0)
        if not self.waiting and 0 < len(live) < WORTH_SHRINKING * len(self.held):
            self.shrink(live)

    def shrink(self, live: np.ndarray) -> None:
        """Keep only the slots in use, in new buffers."""
        self.graphs.clear()
        prompts = sorted(self.slot_of.values())
        rows = torch.from_numpy(live).to(self.device)
        self.cache.keep(rows, torch.tensor(prompts, device=self.device))
        self.rows = {name: value[rows] for name, value in self.rows.items()}
        self.held, self.ages = self.held[live], self.ages[live]
        self.slot_of = {request: prompts.index(slot) for request, slot in self.slot_of.items()}
        self.largest_group = max(Counter(self.owner[i] for i in self.held).values())
        self.reassign()

    def reassign(self) -> None:
        self.cache.assign(
            [-1 if i < 0 else self.slot_of[self.owner[i]] for i in self.held], self.largest_group
        )

    def find_stop_strings(self) -> None:
        """End rows at the token that completes a stop string; only the text that is new since the last look is read."""
        assert self.params.decode is not None
        reach = self.retire_every + 4 * max(
            map(len, self.params.stop_strings)
        )  # a character has at most four tokens
        for row in np.flatnonzero(self.held >= 0).tolist():
            end = int(min(self.ages[row], self.rows["length"][row].item()))
            start = max(0, end - reach)
            text, starts = decode_with_starts(
                self.rows["tokens"][row, start:end].tolist(), self.params.decode
            )
            found = [
                text.find(stop) + len(stop) for stop in self.params.stop_strings if stop in text
            ]
            if found:
                length = (
                    start + int(np.searchsorted(np.append(starts[1:], len(text)), min(found))) + 1
                )
                if length < end or not self.rows["stopped"][row]:
                    (
                        self.rows["length"][row],
                        self.rows["stop_string"][row],
                        self.rows["done"][row],
                    ) = length, True, True

    def result(self) -> Generation:
        """In the order of the requests."""
        ends = np.cumsum([0, *(len(r.keys) for r in self.requests)])
        whole = [sampled for sampled in self.results if sampled is not None]
        assert len(whole) == len(self.results)
        if not all(np.isfinite(s.full_logprobs).all() for s in whole):
            raise UserError(
                "the model's probabilities are no finite numbers: weights are damaged, or training diverged (lower optim.lr)"
            )
        groups = [whole[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        left = np.minimum(self.entered + [len(s.ids) for s in whole], self.waited_until)
        offered = self.num_rows * self.waited_until
        occupancy = float(np.maximum(left - self.entered, 0).sum() / offered) if offered else None
        return Generation(groups, self.num_steps, occupancy, self.kv_bytes)
