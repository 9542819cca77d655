"""The policy: one decoder for the families of `families.py`, in training, prefill and decoding.

Its input is N packed tokens without padding. There is no cache, mask, generation or logits tensor
here: how tokens attend is a function that the caller passes, and token log-probabilities come from
`mar_kernels.linear_logprobs`.

Letters: N packed tokens, M trained tokens, V vocabulary, D width, L layers, H query heads,
Hkv key heads, d = head_dim.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mar_kernels
from mar.errors import UserError
from mar.policy.attention import Attend, group_attention
from mar.policy.families import ARCHITECTURES, Family
from mar.policy.packing import PackedGroups

# our name of a field -> its name in Hugging Face's config.json
HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}

# config.json without one of these is refused
REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# config.json: whole numbers above 0, and switches
COUNTS = (*REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")

# config.json: keys by which other families compute something else, and the value (None: only a
# missing one) that changes nothing. What the decoder comes to compute is taken out here
NEUTRAL = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "scale_emb": 1.0,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "clip_qkv": None,
}

# elements from which reordering a weight pays
LARGE_WEIGHT = 1 << 18

# rows that the reordered weight is laid out for; it serves any number
REORDERED_FOR = 16

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    `rope_scaling` is None or the `llama3` dictionary of Hugging Face's config.json. The layers of
    `without_rope` have no rotary positions.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_positions: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    without_rope: tuple[int, ...] = ()
    # ids from here on have rows but are no tokens (embeddings are padded): nothing draws them, and
    # the distribution is over the others alone. None: all vocab_size ids are tokens
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.num_tokens is not None and not 0 < self.num_tokens <= self.vocab_size:
            raise ValueError(f"num_tokens={self.num_tokens} of {self.vocab_size} rows")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rotary positions need an even one")

    @property
    def family(self) -> Family:
        return ARCHITECTURES[self.architecture]

    @property
    def output_bias(self) -> bool:
        """Whether `o` has a bias, as q, k and v have by `attention_bias`."""
        return self.attention_bias and not self.family.qkv_bias

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """The channels that the norms of queries and of keys each take together."""
        if self.family.qk_norm == "all":
            return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.head_dim, self.head_dim

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """From the dictionary of config.json, as transformers 4 or 5 writes it.

        Raises UserError, naming the key, where the model asks for what this decoder does not
        compute.
        """
        architectures = hf.get("architectures")
        if not isinstance(architectures, list):
            architectures = []
        architecture = str(architectures[0]) if architectures else "none"
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(
                f"config.json: architecture {architecture} is not supported: use one of {known}"
            )
        family = ARCHITECTURES[architecture]
        _refuse_unsupported(architecture, hf)

        fields = dict(family.defaults)
        for ours, theirs in HF_NAMES.items():
            if hf.get(theirs) is not None:
                fields[ours] = hf[theirs]
        num_heads = fields["num_heads"]
        fields.setdefault("num_kv_heads", num_heads)
        fields.setdefault("head_dim", fields["hidden_size"] // num_heads)
        fields["attention_bias"] = family.qkv_bias or fields.get("attention_bias", False)
        fields["qk_norm"] = family.qk_norm != "none"
        fields |= _read_rope(hf, family.defaults.get("rope_theta", 10000.0))
        fields["without_rope"] = _layers_without_rope(hf, family, fields["num_layers"])
        return cls(architecture=architecture, **fields)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of config.json, in the keys of transformers 4, which 5 reads too."""
        shape = {theirs: getattr(self, ours) for ours, theirs in HF_NAMES.items()}
        hf = {
            "architectures": [self.architecture],
            "model_type": self.family.model_type,
            **shape,
            "hidden_act": "silu",
            "sliding_window": None,
            "use_sliding_window": False,
        }
        if self.family.no_rope_interval:
            rotated = [int(layer not in self.without_rope) for layer in range(self.num_layers)]
            hf["no_rope_layers"] = rotated
        return hf


def _refuse_unsupported(architecture: str, hf: dict[str, Any]) -> None:
    family = ARCHITECTURES[architecture]
    window = None
    if family.has_window:
        window = hf.get("sliding_window", family.default_window)
    layer_types = hf.get("layer_types") or ()
    if not isinstance(layer_types, list | tuple):
        layer_types = (layer_types,)
    unsupported = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "quantization_config": hf.get("quantization_config") is not None,
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "sliding_window": window is not None,
        "layer_types": any(kind != "full_attention" for kind in layer_types),
    }
    for key, neutral in NEUTRAL.items():
        unsupported[key] = hf.get(key) not in (None, neutral)
    for key, refused in unsupported.items():
        if refused:
            value = hf.get(key, window)
            raise UserError(f"config.json: {key}={value!r} is not supported for {architecture}")
    for key in REQUIRED_SIZES:
        if hf.get(key) is None:
            raise UserError(f"config.json: {key} is missing")
    for key in COUNTS:
        value = hf.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"config.json: {key}={value!r} must be a whole number above 0")
    for key in ("rms_norm_eps", "rope_theta"):
        value = hf.get(key)
        if value is not None and not _is_positive(value):
            raise UserError(f"config.json: {key}={value!r} must be a number above 0")
    for key in SWITCHES:
        value = hf.get(key)
        if not isinstance(value, bool | None):
            raise UserError(f"config.json: {key}={value!r} must be true or false")


def _is_positive(value: object) -> bool:
    """A number above 0. JSON's true is none."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _layers_without_rope(hf: dict[str, Any], family: Family, num_layers: int) -> tuple[int, ...]:
    """`no_rope_layers` has a 1 for each layer with rotary positions, and a 0 for one without."""
    if not family.no_rope_interval:
        return ()
    rotated = hf.get("no_rope_layers")
    if rotated is None:
        interval = hf.get("no_rope_layer_interval", family.no_rope_interval)
        rotated = [(layer + 1) % interval for layer in range(num_layers)]
    if len(rotated) < num_layers:
        raise UserError(
            f"config.json: no_rope_layers has {len(rotated)} entries for {num_layers} layers"
        )
    return tuple(layer for layer in range(num_layers) if not rotated[layer])


def _read_rope(hf: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """The fields `rope_theta` and `rope_scaling`.

    transformers 5 writes both into `rope_parameters`, transformers 4 wrote two separate keys.
    """
    rope = _rope_section(hf)
    theta = rope.get("rope_theta") or hf.get("rope_theta") or default_theta
    if not _is_positive(theta):
        raise UserError(f"config.json: rope_theta={theta!r} must be a number above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    rotated_part = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if rotated_part != 1.0:
        raise UserError(f"config.json: partial_rotary_factor={rotated_part} is not supported")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind != "llama3":
        raise UserError(f"config.json: rope type {kind!r} is not supported: default and llama3 are")
    for key in LLAMA3_KEYS:
        if not _is_positive(rope.get(key)):
            raise UserError(f"config.json: the llama3 rope scaling has no {key} above 0")
    scaling = {"rope_type": "llama3"} | {key: rope[key] for key in LLAMA3_KEYS}
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _rope_section(hf: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions.

    It may say it for each kind of layer. All layers here have full attention, so that theirs is
    the one; where it is missing, or something else is nested, nothing is guessed.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        key = f"{key}.full_attention"
        rope = rope["full_attention"]
    if not isinstance(rope, dict):
        raise UserError(f"config.json: {key}={rope!r} is not a JSON object")
    for name, value in rope.items():
        if isinstance(value, dict):
            raise UserError(
                f"config.json: {key} is nested ({name}: {value!r}), which is not supported: "
                "rope_type, rope_theta and the scaling must stand in it directly"
            )
    return rope


def rope_frequencies(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " half"]:
    """Radians per position of each pair of channels, [d / 2]: theta^(-2i / d).

    `llama3` scaling divides by `factor` the frequencies that turn less than `low_freq_factor` times
    over the original context, keeps those that turn more than `high_freq_factor` times, and
    interpolates between (Llama 3.1, arXiv:2407.21783).
    """
    powers = torch.arange(0, config.head_dim, 2, device=device).to(dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**powers
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original_length = (config.rope_scaling[key] for key in LLAMA3_KEYS)
    turns = original_length * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: channels i and i + d / 2 of x [N, H, d] are a pair (Hugging Face's order).

    cos, sin [N, 1, d], the first half of `sin` negated, so that one rotation of the axis suffices:
    x_i cos - x_(i + d/2) sin, and x_(i + d/2) cos + x_i sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def reorder_weight(weight: Tensor) -> Tensor | None:
    """A copy of a weight in the memory layout of oneDNN, or None where that gains nothing.

    On a CPU a product with few rows, as in decoding, takes about half as long with it, and one with
    thousands nine tenths (experiments/bench).
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if weight.numel() < LARGE_WEIGHT or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, reordered: Tensor | None) -> Tensor:
    """x [N, in] @ weight [out, in].T + bias -> [N, out].

    `reordered` is what `reorder_weight` made of the weight, or None.
    """
    if reordered is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")


def precise_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 or wider: a product of bfloat16 is not rounded to bfloat16.

    a [..., n, k], b [..., k, m] -> [..., n, m]. Without gradients: a GPU's product of two types has
    none.
    """
    precise = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == precise:
        return a @ b
    if not a.is_cuda:
        return a.to(precise) @ b.to(precise)
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=precise)
    batch = a.shape[:-2]
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=precise)
    return product.unflatten(0, batch)


class Linear(nn.Linear):
    """nn.Linear that uses a reordered copy of its weight while it has one (`for_sampling`)."""

    reordered: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias, self.reordered)


class Block(nn.Module):
    """One layer: attention, then a gated MLP (SwiGLU), each added to its input.

    x = x + attention(norm(x))      attention(x) = o(attend(q, k, v)) with q, k, v = qkv(x)
    x = x + mlp(norm(x))            mlp(x) = down(silu(gate) * up) with gate, up = gate_up(x)

    Or, by the family, x + norm(attention(x)) and x + norm(mlp(x)).
    """

    # norm and rotation of queries and keys: one kernel, without gradients (`for_sampling`)
    heads_in_kernel = False

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.rotated = index not in config.without_rope
        self.norms_after = config.family.norms == "after"
        width = config.hidden_size
        attention_width = config.num_heads * config.head_dim
        qkv_width = attention_width + 2 * config.num_kv_heads * config.head_dim
        mlp_width = config.intermediate_size

        self.attention_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.qkv = Linear(width, qkv_width, bias=config.attention_bias)
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        self.norm_all_heads = config.family.qk_norm == "all"
        if config.qk_norm:
            q_width, k_width = config.qk_norm_widths
            self.q_norm = nn.RMSNorm(q_width, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(k_width, config.rms_norm_eps)
        self.o = Linear(attention_width, width, bias=config.output_bias)
        self.mlp_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.gate_up = Linear(width, 2 * mlp_width, bias=config.mlp_bias)
        self.down = Linear(mlp_width, width, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [N, D] -> [N, D]; cos and sin [N, 1, d] are those of `Decoder.rope`."""
        if self.norms_after:
            x = x + self.attention_norm(self._attention(x, cos, sin, attend))
            return x + self.mlp_norm(self._mlp(x))
        x = x + self._attention(self.attention_norm(x), cos, sin, attend)
        return x + self._mlp(self.mlp_norm(x))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = self._queries_keys_values(x, cos, sin)
        mixed = attend(self.index, q, k, v)
        return self.o(mixed.flatten(1))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def _queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] -> rotated q [N, H, d] and k [N, Hkv, d], and v [N, Hkv, d].

        Queries and keys stay one tensor, for one norm and one rotation instead of two of each.
        """
        heads = rearrange(self.qkv(x), "n (h d) -> n h d", d=self.head_dim)
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.heads_in_kernel and self.rotated:
            qk = self._normed_and_rotated(qk, cos, sin)
        else:
            if self.q_norm is not None and self.k_norm is not None:
                qk = self._normed(qk, self.q_norm, self.k_norm)
            if self.rotated:
                qk = rotate(qk, cos, sin)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def _normed_and_rotated(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Both in one kernel. A norm of all heads together is no part of it."""
        q_weight = k_weight = None
        eps = 0.0
        if self.q_norm is not None and self.k_norm is not None:
            if self.norm_all_heads:
                qk = self._normed(qk, self.q_norm, self.k_norm)
            else:
                q_weight = self.q_norm.weight
                k_weight = self.k_norm.weight
                eps = self.q_norm.eps or 0.0
        return mar_kernels.rotated_heads(
            qk, cos, sin, self.num_heads, q_weight, k_weight, eps, backend="triton"
        )

    def _normed(self, qk: Tensor, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm) -> Tensor:
        """Queries and keys [N, H + Hkv, d] with their norms, of each head or of all together."""
        if self.norm_all_heads:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
            q = q_norm(q.flatten(1)).view_as(q)
            k = k_norm(k.flatten(1)).view_as(k)
            return torch.cat((q, k), dim=1)
        q_weight = q_norm.weight.expand(self.num_heads, -1)
        k_weight = k_norm.weight.expand(self.num_kv_heads, -1)
        normed = F.rms_norm(qk, (self.head_dim,), eps=q_norm.eps)
        return normed * torch.cat((q_weight, k_weight))


class Decoder(nn.Module):
    """Token embedding, L blocks, a last norm, and the head that `linear_logprobs` multiplies with.

    `checkpoint_blocks` recomputes each block in the backward pass: same gradients, less memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.embed = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head: nn.Linear | None = None
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # by dtype and device; not a buffer, which `model.to(bfloat16)` would round
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._initialise()

    def _initialise(self) -> None:
        """Biases 0, matrices normal with variance 1 / fan-in; norms stay at 1.

        The 2L matrices that write into the residual stream add up, so theirs is 1 / (2L fan-in).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
                continue
            # normal_ on the meta device would do nothing but import torch._dynamo, which takes 3 s
            if parameter.dim() != 2 or parameter.is_meta:
                continue
            scale = parameter.shape[1]
            if name.endswith(("o.weight", "down.weight")):
                scale *= 2 * self.config.num_layers
            nn.init.normal_(parameter, std=scale**-0.5)

    @property
    def head_weight(self) -> Float[Tensor, "vocab size"]:
        """[V, D]: the embedding's where they are tied; without the rows that are no tokens."""
        weight = self.embed.weight if self.head is None else self.head.weight
        num_tokens = self.config.num_tokens
        if num_tokens is None or num_tokens == len(weight):
            return weight
        return weight[:num_tokens]

    @contextmanager
    def for_sampling(self, backend: str = "auto") -> Iterator[None]:
        """Within it the linear layers of the blocks use `reorder_weight` of their weights, and the
        norm and rotation of queries and keys are one kernel where mar_kernels has it.

        No weight may change inside, and no gradient be asked for.
        """
        layers = [module for module in self.blocks.modules() if isinstance(module, Linear)]
        blocks = [module for module in self.blocks.modules() if isinstance(module, Block)]
        in_kernel = mar_kernels.has_kernels("triton_decode", backend, self.embed.weight)
        try:
            for layer in layers:
                layer.reordered = reorder_weight(layer.weight)
            for block in blocks:
                block.heads_in_kernel = in_kernel
            yield
        finally:
            for layer in layers:
                layer.reordered = None
            for block in blocks:
                block.heads_in_kernel = False

    def rope(self, positions: Int64[Tensor, " n"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin [N, 1, d] for `rotate`, computed in float32 or wider."""
        precise = torch.promote_types(dtype, torch.float32)
        device = positions.device
        if (precise, device) not in self._frequencies:
            self._frequencies[precise, device] = rope_frequencies(self.config, precise, device)
        angles = positions[:, None].to(precise) * self._frequencies[precise, device]
        cos = angles.cos().to(dtype)[:, None]
        sin = angles.sin().to(dtype)[:, None]
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def hidden(
        self, ids: Int64[Tensor, " n"], positions: Int64[Tensor, " n"], attend: Attend
    ) -> Float[Tensor, "n size"]:
        """Hidden states [N, D] of N tokens, after the last norm.

        `attend(layer, q, k, v)` gets rotated q and k and scales their products by 1 / sqrt(d).
        """
        x = self.embed(ids)
        cos, sin = self.rope(positions, x.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)

    def forward(
        self, packed: PackedGroups, temperature: float = 1.0
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Log-probability, entropy and log-sum-exp of each of the M completion tokens.

        In nats, of softmax(logits / temperature).
        """
        hidden = self.hidden(packed.ids, packed.positions, group_attention(packed))
        return mar_kernels.linear_logprobs(
            hidden[packed.predict_from], self.head_weight, packed.targets, temperature
        )
