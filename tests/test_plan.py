"""The plan of a run: memory by hand for a tiny shape, what must grow or shrink with what, and FSDP2's own count of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mar.compose import compose
from mar.config import ModelOptions
from mar.model import Decoder, ModelConfig
from mar.plan import SHAPES, count, main, plan, policy_of, saved_per_token, shape_of, update_memory
from mar.records import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {"Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360}
TINY = ModelConfig("LlamaForCausalLM", 96, 8, 12, 2, 2, 1, 4)  # untied, no biases


def planned(*words: str) -> dict:
    return plan(compose(["+experiment=paper", "scale=h100x8", *words]))


@pytest.mark.parametrize("name, parameters", PUBLISHED.items())
def test_parameters_are_those_that_are_published(name, parameters):
    with torch.device("meta"):
        assert count(Decoder(SHAPES[f"Qwen/{name}"])) == parameters


def test_memory_of_a_tiny_shape_by_hand():
    """A block: qkv 16x8, o 8x8, gate_up 24x8, down 8x12, two norms of 8 = 496; the root: embedding and head 96x8, a norm of 8 = 1544."""
    model = Decoder(TINY)
    assert count(model) == 2 * 496 + 1544 == 2536
    assert saved_per_token(TINY) == 4 * 8 + (8 + 2 * 4) + 2 * (8 + 4) + 8 + 4 * 12 == 128
    parts = update_memory(model, tokens=10, shards=2, checkpointed=False, compute=2)
    assert parts["weights"] == parts["gradients"] == 4 * 1268
    assert parts["optimizer"] == 8 * 1268
    assert parts["gathered"] == 2 * (1544 + 2 * 496)
    assert parts["activations"] == 2 * 10 * 2 * 128
    assert parts["head"] == 2**28 + 10 * 8 * 12 + 4 * 96 * 8
    assert parts["reduce"] == 6 * 1544
    again = update_memory(model, tokens=10, shards=2, checkpointed=True, compute=2)
    assert again == parts | {"activations": 2 * 10 * (2 * 8 + 128)}
    assert count(nn.Linear(3, 7, bias=False), shards=5) == 2 * 3  # 7 rows on 5 ranks: the first has 2


def test_the_kv_cache_and_the_sampling_copy_by_hand():
    document = planned("algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B")
    held = document["bytes"]
    assert held["kv_cache"] == 2 * 28 * 8 * 128 * 2 * (3072 + 32 * 1536)  # one prompt a GPU, all its rows at once
    assert held["sampling_copy"] == 2 * PUBLISHED["Qwen3-1.7B"]
    assert document["kv_budget_binds"] and document["largest_group"] == (131_072 - 3072) // 1536
    room = int(79 * 2**30 * 0.9) - sum(held[name] for name in ("weights", "gradients", "optimizer", "sampling_copy"))
    bound = planned("algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B", "scale.kv_budget_tokens=9000000")
    assert not bound["kv_budget_binds"] and bound["largest_group"] == (room // (2 * 28 * 8 * 128 * 2) - 3072) // 1536


def test_what_grows_and_what_shrinks():
    full, lora = planned(), planned("model.lora_rank=16")
    assert lora["trained"] < full["trained"] / 100 and lora["bytes"]["optimizer"] < full["bytes"]["optimizer"] / 100
    assert lora["parameters"] == full["parameters"] and lora["bytes"]["reduce"] == 0
    assert max(lora["peak_bytes"].values()) < max(full["peak_bytes"].values()) and lora["step_s"] < full["step_s"]
    assert lora["largest_group"] >= full["largest_group"]
    checkpointed = planned("train.checkpoint_activations=true")
    assert checkpointed["bytes"]["activations"] < full["bytes"]["activations"] == full["activations_without_checkpointing"]
    assert checkpointed["fits"] and not full["fits"] and checkpointed["seconds"]["update"] > full["seconds"]["update"]
    fewer = planned("scale.num_gpus=4")
    assert fewer["bytes"]["weights"] > full["bytes"]["weights"] and fewer["seconds"]["update"] == 2 * full["seconds"]["update"]
    assert planned("train.micro_batch_tokens=32768")["bytes"]["activations"] == 2 * full["bytes"]["activations"]
    assert planned("algo.group_size=16")["step_s"] < full["step_s"]
    assert planned("train.steps=1040")["gpu_hours"] == pytest.approx(2 * full["gpu_hours"])
    assert planned("scale.replicas=2")["bytes"]["optimizer"] == 2 * full["bytes"]["optimizer"]


def test_a_regular_expression_of_trainable_parameters():
    model = policy_of(compose(["+experiment=paper", "scale=h100x8", "model.trainable='^norm'"]))
    assert count(model, trained=True) == 4096


def test_bad_input_is_one_sentence(capsys, tmp_path):
    with pytest.raises(UserError, match="take scale=h100x1"):
        plan(compose(["+experiment=clinic"]))
    with pytest.raises(UserError, match="Qwen/Qwen9-1B: its shape is not known"):
        planned("model.path=Qwen/Qwen9-1B")
    with pytest.raises(UserError, match="config.json does not exist"):
        shape_of(ModelOptions(name="x", source="folder", path=str(tmp_path)))
    with pytest.raises(UserError, match="raise scale.kv_budget_tokens"):
        planned("scale.kv_budget_tokens=4096")
    assert main(["scale=h100x9"]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_folder_and_the_last_line(tmp_path, capsys):
    shape = SHAPES["Qwen/Qwen3-0.6B"]
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    assert main(["+experiment=paper", "scale=h100x1", "model=hf", f"model.path={tmp_path}"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["parameters"] == PUBLISHED["Qwen3-0.6B"] and document["source"] == "computed, not measured"


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_fsdp_holds_what_is_planned(lora_rank):
    """Two fake ranks, in a process of their own: a fake process group would stay."""
    code = f"""if 1:
        import json
        from experiments.plan.fake_step import fake_step
        from mar.model import ModelConfig
        shape = ModelConfig("Qwen3ForCausalLM", 4096, 256, 768, 2, 4, 2, 64, qk_norm=True)
        print(json.dumps(fake_step(shape, 2, 256, {lora_rank}, True)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    tracked, parts = document["tracked"], document["planned"]
    for kind, part in (("Sharded Param", "weights"), ("Sharded Grad", "gradients"), ("OptState", "optimizer")):
        assert tracked[kind] == pytest.approx(parts[part], rel=0.01)
