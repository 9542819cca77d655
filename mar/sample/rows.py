"""The device tensors of the sampler's row slots: what each row draws from, writes, and ends at."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mar.records import Completion
from mar.sample.draws import DrawnTokens


@dataclass
class Rows:
    """B row slots for completions of at most T tokens; every tensor has one entry per slot.

    A row that is done goes on drawing until the engine takes it out. What it draws then lands in
    the last of the T + 1 columns.
    """

    stream_keys: Tensor  # [B] int64: its stream of random draws (draws.stream_key)
    hidden: Tensor  # [B, D]: the hidden state from which its next token is drawn
    last_tokens: Tensor  # [B] int64: the token drawn last
    lengths: Tensor  # [B] int64: the length at which it ends, its limit until it stops earlier
    done: Tensor  # [B] bool
    stopped: Tensor  # [B] bool: it ends with a stop token
    stop_string: Tensor  # [B] bool: it ends with a stop string
    insert_from: Tensor  # [B] int64: where `think_close` is put in; T: nowhere
    tokens: Tensor  # [B, T + 1] int64
    sampler_logprobs: Tensor  # [B, T + 1]
    full_logprobs: Tensor  # [B, T + 1]

    @classmethod
    def allocate(cls, num_rows: int, max_tokens: int, like: Float[Tensor, "V D"]) -> "Rows":
        """Free slots on the device of the head's weight `like`; log-probabilities in float32 or
        wider."""
        device = like.device
        precise = torch.promote_types(like.dtype, torch.float32)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def logprobs() -> Tensor:
            return torch.zeros(num_rows, max_tokens + 1, dtype=precise, device=device)

        return cls(
            stream_keys=integers(num_rows),
            hidden=like.new_zeros(num_rows, like.shape[1]),
            last_tokens=integers(num_rows),
            lengths=integers(num_rows),
            done=torch.ones(num_rows, dtype=torch.bool, device=device),
            stopped=torch.zeros(num_rows, dtype=torch.bool, device=device),
            stop_string=torch.zeros(num_rows, dtype=torch.bool, device=device),
            insert_from=torch.full((num_rows,), max_tokens, device=device),
            tokens=integers(num_rows, max_tokens + 1),
            sampler_logprobs=logprobs(),
            full_logprobs=logprobs(),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def max_tokens(self) -> int:
        return self.tokens.shape[1] - 1

    def enter(
        self,
        rows: Int64[Tensor, " n"],
        stream_keys: Int64[Tensor, " n"],
        limits: Int64[Tensor, " n"],
        hidden: Float[Tensor, "n D"],
    ) -> None:
        """Start new completions in these slots; `hidden` is the state after each one's prompt."""
        self.stream_keys[rows] = stream_keys
        self.lengths[rows] = limits
        self.hidden[rows] = hidden
        self.insert_from[rows] = self.max_tokens
        self.stopped[rows] = False
        self.stop_string[rows] = False
        self.done[rows] = False

    def record(
        self, positions: Int64[Tensor, " B"], drawn: DrawnTokens, stop_ids: Int64[Tensor, " n"]
    ) -> None:
        """Write one token of every row at its position; end rows at a stop token or their limit.

        All columns are written in place: a CUDA graph reads and writes their addresses.
        """
        column = torch.where(self.done, self.max_tokens, positions)[:, None]
        self.tokens.scatter_(1, column, drawn.tokens[:, None])
        self.sampler_logprobs.scatter_(1, column, drawn.sampler_logprobs[:, None])
        self.full_logprobs.scatter_(1, column, drawn.full_logprobs[:, None])
        self.last_tokens.copy_(drawn.tokens)

        new_lengths = positions + 1
        stops = torch.isin(drawn.tokens, stop_ids) & ~self.done
        self.lengths.copy_(torch.where(stops, new_lengths, self.lengths))
        self.stopped |= stops
        self.done |= stops | (new_lengths >= self.lengths)

    def end_at_stop_string(self, row: int, length: int) -> None:
        self.lengths[row] = length
        self.stop_string[row] = True
        self.done[row] = True

    def select(self, rows: Int64[Tensor, " n"]) -> "Rows":
        """Copies of these slots."""
        return self._map(lambda column: column[rows])

    def cpu(self) -> "Rows":
        return self._map(Tensor.cpu)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def completion(self, row: int, sample_index: int, num_close: int) -> Completion:
        """What a finished row has written. `num_close`: the length of `think_close`. On a CPU."""
        length = int(self.lengths[row])
        if self.stop_string[row]:
            finish_reason = "stop_string"
        elif self.stopped[row]:
            finish_reason = "stop"
        else:
            finish_reason = "length"
        inserted = (0, 0)
        insert_from = int(self.insert_from[row])
        if insert_from < length:
            inserted = (insert_from, min(insert_from + num_close, length))
        return Completion(
            sample_index=sample_index,
            ids=self.tokens[row, :length].numpy().copy(),
            sampler_logprobs=self.sampler_logprobs[row, :length].numpy().copy(),
            full_logprobs=self.full_logprobs[row, :length].numpy().copy(),
            finish_reason=finish_reason,
            inserted=inserted,
        )
