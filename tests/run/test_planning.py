"""The plan of a run: memory by hand for tiny shapes, what must grow or shrink with what, FSDP2's own count of it, and the committed tables."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from experiments import report
from experiments.plan.fake_run import SETTINGS
from experiments.plan.run import RESULTS, words_of
from experiments.plan.run import planned as planned_parts
from mar.config import ModelOptions
from mar.errors import UserError
from mar.plan import main
from mar.policy.model import Decoder, ModelConfig
from mar.run.compose import compose
from mar.run.planning import (
    SHAPES,
    decode_memory,
    draw_memory,
    empty_policy,
    model_shape,
    num_parameters,
    plan,
    saved_per_token,
    update_memory,
)
from mar.sample import kv_cache
from mar.sample.draws import Truncation, draw_tokens
from mar.sample.engine import decode_step

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
}
RESIDENT = ("weights", "gradients", "optimizer")
TINY = ModelConfig("LlamaForCausalLM", 96, 8, 12, 2, 2, 1, 4)  # untied, no biases


def planned(*words: str) -> dict:
    has_scale = any(word.startswith("scale=") for word in words)
    scale = [] if has_scale else ["scale=h100x8"]
    return plan(compose(["+experiment=paper", *scale, *words]))


@pytest.mark.parametrize("name, parameters", PUBLISHED.items())
def test_parameters_are_those_that_are_published(name, parameters):
    with torch.device("meta"):
        assert num_parameters(Decoder(SHAPES[f"Qwen/{name}"])) == parameters


def test_a_llama_has_the_published_parameters_too():
    with torch.device("meta"):
        assert num_parameters(Decoder(SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"])) == 134_515_008


def test_memory_of_a_tiny_shape_by_hand():
    """A block: qkv 16x8, o 8x8, gate_up 24x8, down 8x12, two norms of 8 = 496; the root: embedding and head 96x8, a norm of 8 = 1544. Worst is the
    head's backward: root and last block whole; 2 blocks' activations and twice x; 10x96 logits, the head's gradient, and in float32 the hidden
    states' and a product as large as the head. With checkpointing it is a block's backward."""
    model = Decoder(TINY)
    assert num_parameters(model) == 2 * 496 + 1544 == 2536
    assert saved_per_token(TINY) == 4 * 8 + (8 + 2 * 4) + (8 + 4) + 8 + 4 * 12 == 116
    parts = update_memory(model, tokens=10, shards=2, checkpointed=False, compute_bytes=2)
    assert parts == {
        "weights": 4 * 1268,
        "gradients": 4 * 1268,
        "optimizer": 8 * 1268,
        "gathered": 2 * (1544 + 496),
        "activations": 2 * 10 * (2 * 116 + 2 * 8),
        "backward": 2 * 10 * 96 + 2 * 96 * 8 + 4 * 8 * (10 + 96),
        "reduce": 0,
    }
    again = update_memory(model, tokens=10, shards=2, checkpointed=True, compute_bytes=2)
    of_a_block = {
        "gathered": 2 * (1544 + 2 * 496),
        "activations": 2 * 10 * (8 + 116),
        "reduce": 4 * 496,
    }  # its own x is one of the two kept
    assert again == parts | of_a_block | {"backward": 2 * 10 * (8 + 2 * 12) + 2 * 96 * 8 + 2 * 496}
    assert (
        num_parameters(nn.Linear(3, 7, bias=False), shards=5) == 2 * 3
    )  # 7 rows on 5 ranks: the first has 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_where_the_blocks_are_wide_their_backward_is_the_worst(checkpointed):
    """A block: qkv 16x8, o 8x8, gate_up 128x8, down 8x64, norms 8+8+4+4 = 1752; the root, tied: 16x8 + 8 = 136. Of each token a block keeps
    4x8 + 16 + 2x12 + 8 + 4x64 = 336."""
    model = Decoder(
        ModelConfig("Qwen3ForCausalLM", 16, 8, 64, 3, 2, 1, 4, qk_norm=True, tied_embeddings=True)
    )
    parts = update_memory(model, tokens=1000, shards=8, checkpointed=checkpointed, compute_bytes=2)
    assert parts["gathered"] == 2 * (136 + 2 * 1752)
    assert parts["activations"] == 2000 * (2 * 8 + 336 if checkpointed else 3 * 336)
    assert parts["backward"] == 2000 * (8 + 2 * 64) + 2 * 16 * 8 + 2 * 1752
    assert parts["reduce"] == 4 * 1752
    alone = update_memory(model, tokens=1000, shards=1, checkpointed=checkpointed, compute_bytes=2)
    assert alone["gathered"] == 2 * (136 + 1752)  # nothing is fetched ahead


@pytest.mark.parametrize("shards, reduced", [(1, 8), (4, 6)])
def test_where_the_vocabulary_is_large_and_tokens_few_reducing_its_gradients_is_the_worst(
    shards, reduced
):
    model = Decoder(replace(TINY, vocab_size=1000))
    parts = update_memory(model, tokens=1, shards=shards, checkpointed=True, compute_bytes=2)
    assert (
        parts["backward"] + parts["reduce"] == reduced * (2 * 1000 * 8 + 8)
        and parts["gathered"] == parts["activations"] == 0
    )


def test_the_kv_cache_and_the_sampling_copy_by_hand():
    document = planned("algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B")
    held = document["bytes"]
    assert held["kv_cache"] == 2 * 28 * 8 * 128 * 2 * (
        3072 + 32 * 1536
    )  # one prompt a GPU, all its rows at once
    assert held["sampling_copy"] == 2 * PUBLISHED["Qwen3-1.7B"]
    freed = planned(
        "algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B", "scale.keep_copy=false"
    )["peak_bytes"]
    assert document["peak_bytes"]["update"] - freed["update"] == held["sampling_copy"]
    assert document["peak_bytes"]["sampling"] == freed["sampling"]
    offloaded = planned(
        "algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B", "scale.offload=true"
    )
    in_cpu_memory = held["weights"] + held["gradients"] + held["optimizer"]
    for peak in ("sampling", "update"):
        assert document["peak_bytes"][peak] - offloaded["peak_bytes"][peak] == in_cpu_memory
    assert document["kv_budget_binds"] and document["largest_group"] == (131_072 - 3072) // 1536
    room = int(79 * 2**30 * 0.9) - sum(
        held[name]
        for name in ("weights", "gradients", "optimizer", "sampling_copy", "decode_graphs")
    )
    bound = planned(
        "algo.prompts_per_step=8", "model.path=Qwen/Qwen3-1.7B", "scale.kv_budget_tokens=9000000"
    )
    assert (
        not bound["kv_budget_binds"]
        and bound["largest_group"] == (room // (2 * 28 * 8 * 128 * 2) - 3072) // 1536
    )


SHARD = 4 * PUBLISHED["Qwen3-8B"] // 8
COPY = 2 * PUBLISHED["Qwen3-8B"]


@pytest.mark.parametrize(
    "words, loading, resident",
    [
        ((), SHARD + COPY, 4 * SHARD),
        (("algo=grpo", "algo.kl_coef=0.04"), 2 * SHARD + COPY, 5 * SHARD),
        (("algo=ppo", "algo.kl_coef=0.04"), 3 * SHARD + COPY, 9 * SHARD),
        (("algo=ppo", "algo.kl_coef=0.04", "scale.offload=true"), COPY, 0),
    ],
)
def test_loading_holds_the_shards_of_every_model_and_the_copy(words, loading, resident):
    """Of Qwen3-8B on 8 GPUs. A critic has no head of the vocabulary, 151,936 x 4,096, but one of a
    row and a bias, which every rank holds."""
    document = planned(*words)
    held, peaks = document["bytes"], document["peak_bytes"]
    if held["critic"]:
        head = 4 * 151_936 * 4096 // 8
        loading -= head
        resident -= 4 * head
    assert peaks["loading"] == pytest.approx(loading, abs=2 * 4 * 4097)
    of_sampling = held["kv_cache"] + held["decode_graphs"] + COPY
    assert peaks["sampling"] - of_sampling == pytest.approx(resident, abs=4 * 2 * 4 * 4097)


@pytest.mark.parametrize("words", [(), ("model.lora_rank=16",)])
def test_older_weights_are_copies_of_the_shards_that_are_trained(words):
    plain = planned(*words)
    lagging = planned(*words, "algo.lag=3")
    held = lagging["bytes"]["past_weights"]
    assert held == 3 * plain["bytes"]["gradients"] and "past_weights" not in plain["bytes"]
    for peak, more in (("loading", 0), ("sampling", held), ("update", held)):
        assert lagging["peak_bytes"][peak] - plain["peak_bytes"][peak] == more
    offloaded = planned(*words, "algo.lag=3", "scale.offload=true")
    assert offloaded["bytes"]["past_weights"] == 0


def test_the_sampling_copy_has_the_adapters():
    lora = planned("model.lora_rank=16")
    assert lora["bytes"]["sampling_copy"] == COPY + 2 * lora["trained"]


@pytest.mark.parametrize(
    "rows, own, prompts, asked, group",
    [(8, 64, 2, 300, 4), (8, 500, 1, 16, 8), (8, 4, 1, 4, 8), (13, 64, 3, 200, 5)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decode_step_works_in_what_is_planned(
    monkeypatch, dtype, rows, own, prompts, asked, group
):
    """Counted by PyTorch's tracker on the meta device, where products of bfloat16 are made to give
    float32 without a copy of their factors, as on a GPU. Worst is the attention to the prompts, to
    the rows' own tokens, and the MLP."""
    shape = ModelConfig("Qwen3ForCausalLM", 96, 64, 512, 2, 8, 2, 16, qk_norm=True)

    def product(a, b):
        batch = a.shape[:-1]
        return a.new_empty(*batch, b.shape[-1], dtype=torch.promote_types(a.dtype, torch.float32))

    monkeypatch.setattr(kv_cache, "precise_product", product)
    with torch.device("meta"):
        model = Decoder(shape).to(dtype)
    cache = kv_cache.KVCache.allocate(shape, prompts, asked, rows, own, like=model.embed.weight)
    row_prompt = [min(row // group, prompts - 1) for row in range(rows)]
    cache.assign(row_prompt, group)
    tokens = torch.zeros(rows, dtype=torch.int64, device="meta")
    tracker = MemTracker()
    tracker.track_external(model, tokens, *vars(cache).values())

    def held(when):
        return tracker.get_tracker_snapshot(when)[torch.device("meta")]["Total"]

    before = held("current")
    with torch.no_grad(), tracker:
        decode_step(model, cache, tokens, own)
    counted = held("peak") - before
    planned = decode_memory(shape, rows, own, prompts, asked, group, dtype.itemsize)
    assert planned == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("algo.temperature=0.7",),
        ("algo.top_k=20",),
        ("algo.top_p=0.9", "algo.temperature=0.7"),
    ],
)
def test_a_draw_works_in_what_is_planned(words, vocab_size):
    """Counted by PyTorch's tracker on the meta device."""
    algo = compose([*words, "algo.importance=truncated"]).algo
    truncation = Truncation(algo.top_k, algo.top_p, algo.min_p)
    rows = 8
    with torch.device("meta"):
        hidden = torch.empty(rows, 4)
        head = torch.empty(4, vocab_size)
        uniform = torch.empty(rows, dtype=torch.float64)
    tracker = MemTracker()
    tracker.track_external(hidden, head, uniform)

    def held(when):
        return tracker.get_tracker_snapshot(when)[torch.device("meta")]["Total"]

    before = held("current")
    with torch.no_grad(), tracker:
        logits = hidden @ head
        draw_tokens(logits, uniform, algo.temperature, truncation)
    counted = held("peak") - before
    assert draw_memory(algo, rows, vocab_size) == pytest.approx(counted, rel=0.05)


def test_the_pool_of_the_graphs_is_part_of_sampling():
    document = planned()
    held = document["bytes"]
    pool = held["decode_graphs"]
    resident = held["weights"] + held["gradients"] + held["optimizer"] + held["sampling_copy"]
    assert document["peak_bytes"]["sampling"] == resident + held["kv_cache"] + pool
    # logits in float32, five times: the paper's temperature is not 1
    assert document["rows_at_once"] == 73
    assert pool == 4 * 5 * 73 * 151_936
    # Of prompts twice as long five fit. 32 places a prompt, 32 heads: scores in float32, twice.
    long = planned("model.max_prompt_tokens=6144")
    assert long["bytes"]["decode_graphs"] == pytest.approx(2 * 4 * 5 * 32 * 32 * 6144, rel=0.05)


def test_what_grows_and_what_shrinks():
    full, lora = (
        planned("train.checkpoint_activations=false"),
        planned("train.checkpoint_activations=false", "model.lora_rank=16"),
    )
    assert (
        lora["trained"] < full["trained"] / 100
        and lora["bytes"]["optimizer"] < full["bytes"]["optimizer"] / 100
    )
    assert (
        lora["parameters"] == full["parameters"]
        and lora["bytes"]["backward"] < full["bytes"]["backward"]
    )
    assert (
        max(lora["peak_bytes"].values()) < max(full["peak_bytes"].values())
        and lora["step_s"] < full["step_s"]
    )
    assert lora["largest_group"] >= full["largest_group"]
    checkpointed = planned()  # by the scale's preset
    assert (
        checkpointed["bytes"]["activations"]
        < full["bytes"]["activations"]
        == full["activations_without_checkpointing"]
    )
    assert (
        checkpointed["fits"]
        and not full["fits"]
        and checkpointed["seconds"]["update"] > full["seconds"]["update"]
    )
    fewer = planned("scale.num_gpus=4", "train.checkpoint_activations=false")
    assert (
        fewer["bytes"]["weights"] > full["bytes"]["weights"]
        and fewer["seconds"]["update"] == 2 * full["seconds"]["update"]
    )
    assert (
        planned("train.micro_batch_tokens=32768", "train.checkpoint_activations=false")["bytes"][
            "activations"
        ]
        == 2 * full["bytes"]["activations"]
    )
    assert planned("algo.group_size=16")["step_s"] < checkpointed["step_s"]
    assert planned("train.steps=1040")["gpu_hours"] == pytest.approx(2 * checkpointed["gpu_hours"])
    assert planned("scale.replicas=2")["bytes"]["optimizer"] == 2 * full["bytes"]["optimizer"]


def test_several_updates_begin_with_a_pass_for_the_old_logprobs():
    seconds = [
        planned(f"algo.epochs={epochs}", f"algo.minibatches={parts}")["seconds"]["update"]
        for epochs, parts in ((1, 1), (1, 2), (2, 1), (2, 2))
    ]
    # of forward, forward again, and backward (4 passes) one more forward
    wanted = [4, 4 + 1, 2 * 4 + 1, 2 * (4 + 1)]
    assert seconds == pytest.approx([passes / 4 * seconds[0] for passes in wanted], rel=0.01)


def test_a_regular_expression_of_trainable_parameters():
    model = empty_policy(compose(["+experiment=paper", "scale=h100x8", "model.trainable='^norm'"]))
    assert num_parameters(model, trained=True) == 4096


def test_bad_input_is_one_sentence(capsys, tmp_path):
    with pytest.raises(UserError, match="take scale=h100x1"):
        plan(compose(["+experiment=clinic"]))
    with pytest.raises(UserError, match="Qwen/Qwen9-1B: shape unknown here"):
        planned("model.path=Qwen/Qwen9-1B")
    with pytest.raises(UserError, match="config.json does not exist"):
        model_shape(ModelOptions(name="x", source="folder", path=str(tmp_path)))
    with pytest.raises(UserError, match="raise scale.kv_budget_tokens"):
        planned("scale.kv_budget_tokens=4096")
    assert main(["scale=h100x9"]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_folder_and_the_last_line(tmp_path, capsys):
    shape = SHAPES["Qwen/Qwen3-0.6B"]
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    assert main(["+experiment=paper", "scale=h100x1", "model=hf", f"model.path={tmp_path}"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        document["parameters"] == PUBLISHED["Qwen3-0.6B"]
        and document["source"] == "computed, not measured"
    )


@pytest.mark.slow
def test_fsdp_holds_what_is_planned():
    """Four layers of Qwen3-1.7B on two fake ranks, in a process of its own: a fake process group would stay."""
    pytest.importorskip(
        "triton", reason="the log-probabilities' memory is that of the Triton module"
    )
    code = """if 1:
        import json
        from dataclasses import replace
        from experiments.plan.fake_step import fake_step
        from mar.run.planning import SHAPES
        shape = replace(SHAPES["Qwen/Qwen3-1.7B"], num_layers=4)
        for rank, checkpointed in ((0, True), (0, False), (16, True)):
            print(json.dumps({"checkpointed": checkpointed, **fake_step(shape, 2, 8192, rank, checkpointed)}))"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        document = json.loads(line)
        for part, bytes_planned in document["planned"].items():
            bound = {"total": 0.02, "pass": 0.1}.get(part, 0.01)
            if (
                part != "gathered" or document["checkpointed"]
            ):  # without, two moments lie within 1 % of one another
                assert bytes_planned == pytest.approx(document["tracked"][part], rel=bound), part
        assert (
            document["phases"]["optimizer"]["Total"] < document["tracked"]["total"]
        )  # that AdamW's temporaries may be left out


@pytest.mark.slow
def test_loading_and_update_of_five_settings_are_within_three_percent_of_fsdps_count():
    """Eight layers of Qwen3-8B on eight fake ranks: the paper's run, grpo, ppo, adapters, offload."""
    pytest.importorskip(
        "triton", reason="the log-probabilities' memory is that of the Triton module"
    )
    done = subprocess.run(
        [sys.executable, "experiments/plan/fake_run.py", "--layers", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["default", "grpo", "ppo", "LoRA", "offload"]
    for name, moments in found.items():
        for moment, held in moments.items():
            assert held["planned"] == pytest.approx(held["tracked"], rel=0.03), (name, moment)


def test_the_presets_fit():
    assert planned()["fits"] and planned("scale=h100x1")["fits"]
    eight = ("scale=h100x1", "model=qwen3-8b", "scale.kv_budget_tokens=131072")
    assert planned(*eight, "model.lora_rank=16")["fits"] and not planned(*eight)["fits"]


@pytest.mark.slow
def test_the_committed_tables_are_of_this_planner(monkeypatch, tmp_path):
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(row["model"], row["gpus"], row["lora_rank"]) for row in rows] == list(
        product(PUBLISHED, (1, 8), (0, 16))
    )
    for row in rows[::5]:
        now = plan(
            compose(words_of(row["model"].removeprefix("Qwen3-"), row["gpus"], row["lora_rank"]))
        )
        assert row["computed"] == json.loads(json.dumps(now)), "run experiments/plan/run.py again"
    for row in (row for row in rows if row["tracked"]):
        for part, size in planned_parts(row).items():
            assert size == pytest.approx(
                row["tracked"][part], rel=0.01 if part in RESIDENT else 0.1
            )
    for name, moments in json.loads((RESULTS.parent / "settings.json").read_text()).items():
        peaks = planned(*SETTINGS[name])["peak_bytes"]
        for moment, held in moments.items():
            assert held["planned"] == peaks[moment], "run experiments/plan/fake_run.py again"
            assert held["planned"] == pytest.approx(held["tracked"], rel=0.03)
    text = (RESULTS.parent / "README.md").read_text()
    assert report.fill(text) == text, "run `make report`"
    rows[-1]["tracked"]["total"] += 2**30
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("experiments.plan.run.RESULTS", tmp_path / "results.json")
    assert report.fill(text) != text
