"""The decoder computes what transformers computes, and refuses by name what it does not compute."""

from copy import deepcopy

import pytest
import torch
import transformers

from mar.errors import UserError
from mar.policy import model as decoder
from mar.policy.attention import group_attention
from mar.policy.families import ARCHITECTURES
from mar.policy.model import (
    LARGE_WEIGHT,
    REQUIRED_SIZES,
    Decoder,
    ModelConfig,
    project,
    reorder_weight,
)
from mar.policy.packing import pack_groups
from mar.policy.weights import load_model, save_model, split_state

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
# `pad_token_id` None where a class has one: transformers gives the row of that token no gradient.
CASES = {
    "llama": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": False}),
    "llama-bias": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "rope_theta": 5e5, "rope_scaling": LLAMA3,
                              "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": None}),
    "smollm3": ("SmolLM3", {"num_attention_heads": 6, "num_key_value_heads": 2, "no_rope_layers": [0, 1], "pad_token_id": None}),
    "smollm3-interval": ("SmolLM3", {"num_attention_heads": 3, "num_key_value_heads": 3, "no_rope_layer_interval": 2, "attention_bias": True,
                                     "tie_word_embeddings": False, "pad_token_id": None}),
    "olmo2": ("Olmo2", {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 5e5, "pad_token_id": None}),
    "olmo2-tied": ("Olmo2", {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True, "attention_bias": True,
                             "pad_token_id": None}),
}  # fmt: skip


def hf_model(case: str):
    name, extra = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SHAPE, **deepcopy(extra), attn_implementation="eager"
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def our_logits(model, rows):
    packed = pack_groups(rows, [[]] * len(rows))
    hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))
    return hidden @ model.head_weight.T


def assert_same_gradients(ours, theirs, rows):
    """Of the log-probability of the rows' own tokens, by the checkpoint's names; float64."""
    logprobs = our_logits(ours, rows.tolist()).log_softmax(-1)
    logprobs.gather(1, rows.flatten()[:, None]).sum().backward()
    logprobs = theirs(rows).logits.log_softmax(-1)
    logprobs.gather(2, rows[..., None]).sum().backward()
    expected = dict(theirs.named_parameters())
    found = split_state(ours.config, {name: p.grad for name, p in ours.named_parameters()})
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    rows = torch.randint(0, 101, (2, 70))
    # transformers keeps norms and rope in float32
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 2e-6)):
        ours = load_model(tmp_path / "theirs", dtype)
        with torch.no_grad():
            expected = theirs.to(dtype)(rows).logits
            found = our_logits(ours, rows.tolist())
        torch.testing.assert_close(found, expected.flatten(0, 1), atol=tolerance, rtol=0)
    save_model(ours, tmp_path / "ours")
    assert_same_gradients(ours, theirs, rows)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, attn_implementation="eager"
    )
    assert type(back) is type(theirs)
    with torch.no_grad():
        assert torch.equal(back(rows).logits, theirs(rows).logits)


def test_positions_far_from_the_start():
    """Rope in float32: shifting a row by 10,000 positions changes nothing but rounding."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig("LlamaForCausalLM", 50, 32, 48, 2, 2, 2, 16))
    packed = pack_groups([list(range(20))], [[]])
    hidden = [
        model.hidden(packed.ids, packed.positions + shift, group_attention(packed))
        for shift in (0, 10_000)
    ]
    torch.testing.assert_close(hidden[0], hidden[1], atol=2e-3, rtol=0)


def test_initialisation_is_deterministic_and_scaled():
    config = ModelConfig("Qwen3ForCausalLM", 300, 64, 256, 8, 4, 2, 32, qk_norm=True)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(Decoder(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert models[0]["blocks.0.gate_up.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert models[0]["blocks.0.down.weight"].std().item() == pytest.approx(256**-0.5 / 4, rel=0.05)
    assert torch.equal(models[0]["norm.weight"], torch.ones(64))


def test_config_round_trip():
    for config in (
        ModelConfig(
            "Qwen2ForCausalLM", 31, 24, 40, 2, 3, 1, 8, attention_bias=True, tied_embeddings=True
        ),
        ModelConfig(
            "LlamaForCausalLM", 31, 24, 40, 2, 3, 1, 10, 1e-5, 5e5, LLAMA3, 4096, mlp_bias=True
        ),
    ):
        assert ModelConfig.from_hf(config.to_hf()) == config


BASE = ModelConfig("LlamaForCausalLM", 31, 24, 40, 2, 3, 1, 8).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
        ({"architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
        # Phi-3-mini-4k, Phi-4-mini, Phi-3-mini-128k
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047}, "sliding_window=2047"),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75},
            "partial_rotary_factor=0.75",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
            "'longrope'",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True},
            "use_sliding_window=True",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
            "no_rope_layers has 1 entries for 2 layers",
        ),
        ({"architectures": None}, "architecture none"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window=4096"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
            "use_sliding_window=True",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"attention_multiplier": 0.015625}, "attention_multiplier=0.015625"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_key_value_heads": 2}, "num_kv_heads=2"),
    ),
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(
            {key: value for key, value in (BASE | change).items() if value is not None}
        )


def test_keys_that_are_missing_have_transformers_defaults():
    """As in the hub's config.json of SmolLM3, which leaves out what its class says."""
    sizes = {key: BASE[key] for key in REQUIRED_SIZES}
    for architecture in ARCHITECTURES:
        name = architecture.removesuffix("ForCausalLM")
        theirs = getattr(transformers, f"{name}Config")(**sizes)
        hf = {"architectures": [architecture], "sliding_window": None, **sizes}
        ours = ModelConfig.from_hf(hf)
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        assert ours.max_positions == theirs.max_position_embeddings
    smollm3 = ModelConfig.from_hf(
        {"architectures": ["SmolLM3ForCausalLM"], **sizes, "num_hidden_layers": 9}
    )
    assert smollm3.without_rope == (3, 7)


def test_mistral_without_the_key_has_its_default_window():
    config = {key: value for key, value in BASE.items() if key != "sliding_window"}
    with pytest.raises(UserError, match="sliding_window=4096"):
        ModelConfig.from_hf(config | {"architectures": ["MistralForCausalLM"]})


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_a_reordered_weight_gives_the_same_product(rows, biased):
    torch.manual_seed(0)
    x = torch.randn(rows, 512)
    weight = torch.randn(LARGE_WEIGHT // 512, 512)
    bias = torch.randn(len(weight)) if biased else None
    expected = x.double() @ weight.double().T + (bias if biased else 0)
    reordered = reorder_weight(weight)
    assert reordered is not None and reordered.layout == torch._mkldnn
    with torch.inference_mode():
        out = project(x, weight, bias, reordered)
    # as far off as x @ weight.T in float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-4)
    assert out.is_contiguous()


def test_only_large_float32_weights_are_reordered_and_only_for_a_while(tiny_model, monkeypatch):
    assert reorder_weight(torch.zeros(LARGE_WEIGHT - 1, 1)) is None
    assert reorder_weight(torch.zeros(LARGE_WEIGHT, 1, dtype=torch.float64)) is None
    monkeypatch.setattr(decoder, "LARGE_WEIGHT", 0)
    model = tiny_model(dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [module for module in model.modules() if isinstance(module, decoder.Linear)]
    with pytest.raises(KeyboardInterrupt), model.for_sampling():
        assert all(layer.reordered is not None for layer in layers)
        raise KeyboardInterrupt
    assert (
        all(layer.reordered is None for layer in layers)
        and len(layers) == 4 * model.config.num_layers
    )
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


PLAIN = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}


@pytest.mark.parametrize("key", ("rope_parameters", "rope_scaling"))
def test_rotary_positions_said_by_kind_of_layer_are_read_or_refused(key):
    full = {"rope_type": "default", "rope_theta": 1e6}
    windowed = {"rope_type": "default", "rope_theta": 1e4}
    for kinds in (
        {"full_attention": full},
        {"full_attention": full, "sliding_attention": windowed},
    ):
        assert ModelConfig.from_hf(PLAIN | {key: kinds}).rope_theta == 1e6
    for kinds in (
        {"sliding_attention": windowed},
        {"default": full},
        {"full_attention": {"x": {}}},
    ):
        with pytest.raises(UserError, match=f"{key}.* is nested"):
            ModelConfig.from_hf(PLAIN | {key: kinds})


@pytest.mark.parametrize(
    ("key", "value"),
    (
        ("rope_parameters", "default"),
        ("rope_parameters", [1]),
        ("rope_theta", -1.0),
        ("rope_theta", "1e6"),
        ("rms_norm_eps", True),
        ("hidden_size", 24.0),
        ("vocab_size", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", "3"),
        ("head_dim", -8),
        ("max_position_embeddings", "2k"),
        ("tie_word_embeddings", "true"),
        ("attention_bias", 1),
        ("architectures", 5),
        ("architectures", []),
        ("layer_types", 5),
    ),
)
def test_a_value_of_another_kind_is_named(key, value):
    with pytest.raises(UserError, match=key[:12]):
        ModelConfig.from_hf(PLAIN | {key: value})
