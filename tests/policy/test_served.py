"""What vLLM's reader asks of a folder that `save_model` and `mar.export` write, for every family.

vLLM is not installed here and was not run. Parts of its reader were read (the model classes, the
registry, the config and the sampling defaults), and each test holds one thing that they need.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from mar.answers.tokenizer import copy_tokenizer, load_tokenizer
from mar.export import _save_generation_config, _special_token_ids
from mar.policy.families import ARCHITECTURES
from mar.policy.sources import EMBEDDED
from mar.policy.weights import save_model
from mar.run.compose import compose
from tests.conftest import SHAPES

# The families by the names of its registry; SmolLM3 runs through transformers there.
REGISTRY = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "SmolLM3ForCausalLM": transformers.SmolLM3Config,
    "Olmo2ForCausalLM": transformers.Olmo2Config,
}
TOKEN_IDS = {"eos_token_id": [1, 3], "pad_token_id": 0}
# What it takes out of generation_config.json for its sampling.
SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")


@pytest.fixture(params=list(SHAPES))
def folder(request, tiny_model, tmp_path) -> Path:
    save_model(tiny_model(request.param), tmp_path, torch.bfloat16, extra=TOKEN_IDS)
    return tmp_path


def document(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tensors(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of all tensors of a folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.offset_keys()}


def test_every_family_is_one_that_it_knows():
    assert ARCHITECTURES.keys() == REGISTRY.keys() == SHAPES.keys()


def test_the_architecture_is_named_and_its_config_class_found(folder):
    (architecture,) = document(folder)["architectures"]
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is REGISTRY[architecture]


def test_tensors_have_its_names_and_shapes(folder):
    """It looks each one up among its own, which are called as transformers' are."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        # tied, it has one parameter for both and refuses a second
        del wanted["lm_head.weight"]
    assert tensors(folder) == wanted


def test_the_head_is_there_where_it_is_not_tied(folder):
    assert ("lm_head.weight" in tensors(folder)) is not document(folder)["tie_word_embeddings"]


def test_heads_divide_the_width_and_each_other(folder):
    config = document(folder)
    heads = config["num_attention_heads"]
    assert config["hidden_size"] % heads == 0 and heads % config["num_key_value_heads"] == 0


def test_rotary_base_precision_length_and_window_are_told(folder):
    told = document(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == told["rope_theta"] > 0
    assert config.rope_parameters["rope_type"] == "default"
    assert config.dtype == torch.bfloat16 and told["torch_dtype"] == "bfloat16"
    assert config.max_position_embeddings == told["max_position_embeddings"] > 0
    assert getattr(config, "sliding_window", None) is None
    assert config.eos_token_id == [1, 3]


def test_nothing_in_the_folder_is_taken_for_another_format(folder):
    """params.json or consolidated.safetensors would be read as Mistral's own format, and every
    further *.safetensors as a part of the model."""
    copy_tokenizer(EMBEDDED, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    names = {path.name for path in folder.iterdir()}
    assert not names & {"params.json", "consolidated.safetensors", "tekken.json"}


def test_sampling_defaults_and_stop_tokens_are_the_runs(tmp_path):
    """It takes the tokenizer's end token, and the others from generation_config.json."""
    copy_tokenizer(EMBEDDED, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    config = compose(["+experiment=clinic", "algo.temperature=0.7"])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    stops = _special_token_ids(tokenizer, tmp_path)
    _save_generation_config(tmp_path, config, stops, no_tokens=[])
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    sampling = {name: theirs[name] for name in SAMPLING if name in theirs}
    # of top_k and top_p these mean all tokens
    assert sampling == {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    served = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert {served.eos_token_id, *theirs["eos_token_id"]} == {1, 3}
    assert served.chat_template and len(served) == len(tokenizer)
