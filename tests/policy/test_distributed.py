"""Several ranks are one run: the same completions, and parameters that agree in float64."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mar.config import ScaleOptions
from mar.errors import UserError
from mar.learn.learner import Learner
from mar.policy import distributed
from mar.policy.distributed import World, compute_device, join
from mar.policy.lora import adapted
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.run import checkpoint
from mar.run.compose import load_config
from mar.train import main
from tests.helpers.processes import end, free_port, start

ROOT = Path(__file__).resolve().parents[2]
WORDS = """
+experiment=clinic train.steps=3 eval.num_items=3 algo.prompts_per_step=3 algo.group_size=3
model.lora_rank=0 model.trainable= model.lr=1e-3 optim.grad_clip=0.01 scale.dtype=float64
train.micro_batch_tokens=256 checkpoint.every=1 logger.console=plain
""".split()


def train(out: Path, ranks: int, *words: str) -> Path:
    """The run directory of a training run on `ranks` processes."""
    out.mkdir(exist_ok=True)
    command = [*WORDS, f"out={out}", *words]
    if ranks == 1:
        places: list[dict[str, str]] = [{}]
    else:
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        here |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        places = [here | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    said = [out / f"rank{rank}.out" for rank in range(ranks)]
    processes = [start(main, command, said=f, **p) for f, p in zip(said, places, strict=True)]
    for process, file in zip(processes, said, strict=True):
        end(process, file)
    return out / "clinic" / "seed0"


def train_by_torchrun(out: Path, ranks: int, *words: str) -> Path:
    """The same by the command that the README names."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "mar.train", *WORDS, f"out={out}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "clinic" / "seed0"


def parameters(run: Path) -> torch.Tensor:
    """All parameters after the last step, in one line; they did move."""
    model = load_model(resolve_model("embedded", "embedded", None)[0], dtype=torch.float64)
    model = adapted(model, load_config(run / "config.yaml").model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None and found.step == 3
    checkpoint.restore_weights(found, model)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).abs().max() > 1e-4
    return after


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = train(tmp_path_factory.mktemp("alone"), 1)
    return (run / "completions.jsonl").read_text(), parameters(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch, ranks, words",
    [
        (train_by_torchrun, 2, ("scale.keep_copy=false", "scale.offload=true")),
        (train, 4, ("scale.replicas=2",)),
    ],
)
def test_ranks_agree_with_one_process(alone, tmp_path, launch, ranks, words):
    """Three prompts on two ranks are uneven; on four ranks one has none; 2 x 2 is HSDP.

    Offloading moves nothing on a CPU.
    """
    run = launch(tmp_path, ranks, *words)
    assert (run / "completions.jsonl").read_text() == alone[0]
    torch.testing.assert_close(parameters(run), alone[1], rtol=0, atol=1e-8)


@pytest.mark.slow
def test_float32_agrees_too_as_far_as_it_reaches(tmp_path):
    one, two = (
        parameters(train(tmp_path / str(ranks), ranks, "scale.dtype=float32")) for ranks in (1, 2)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_critic_a_reference_and_several_updates_agree_too(tmp_path):
    words = ("algo=ppo", "algo.kl_coef=0.01", "algo.epochs=2", "algo.minibatches=2")
    one, two = (train(tmp_path / str(ranks), ranks, *words) for ranks in (1, 2))
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    torch.testing.assert_close(parameters(one), parameters(two), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_adapters_agree_too(tmp_path):
    """Sharded adapters beside a frozen, sharded base."""
    one, two = (train(tmp_path / str(ranks), ranks, "model.lora_rank=3") for ranks in (1, 2))
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    torch.testing.assert_close(parameters(one), parameters(two), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_older_weights_agree_too_and_a_run_of_them_goes_on(tmp_path):
    """Sampled from sharded weights of two steps ago; stopped and resumed on two ranks."""
    words = ("algo.lag=2", "algo.loss=ppo", "scale.replicas=1")
    one = train(tmp_path / "1", 1, *words)
    two = train(tmp_path / "2", 2, *words)
    train(tmp_path / "cut", 2, *words, "train.stop_at=2")
    cut = train(tmp_path / "cut", 2, *words)
    texts = [(run / "completions.jsonl").read_text() for run in (one, two, cut)]
    assert texts[0] == texts[1] == texts[2]
    torch.testing.assert_close(parameters(one), parameters(two), rtol=0, atol=1e-8)
    assert torch.equal(parameters(two), parameters(cut))


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_ranks_and_with_its_own_bit_for_bit(alone, tmp_path):
    train(tmp_path / "1", 2, "train.stop_at=2")
    for ranks in (2, 4):
        shutil.copytree(tmp_path / "1", tmp_path / str(ranks))
    runs = {ranks: train(tmp_path / str(ranks), ranks) for ranks in (1, 2, 4)}
    for run in runs.values():
        assert (run / "completions.jsonl").read_text() == alone[0]
        torch.testing.assert_close(parameters(run), alone[1], rtol=0, atol=1e-8)
    assert torch.equal(parameters(runs[2]), parameters(train(tmp_path / "uninterrupted", 2)))


@pytest.mark.parametrize("kept", [True, False])
def test_the_copy_to_sample_from_is_filled_each_time_and_freed_if_asked(tiny_model, kept):
    model, whole = tiny_model(seed=0), tiny_model(seed=1)
    config = SimpleNamespace(scale=ScaleOptions(keep_copy=kept))
    learner = Learner(config, model, None, sampling_copy=whole)
    addresses = set()
    for _ in range(2):
        with learner.sampling_policy() as policy:
            assert policy is whole
            addresses.add(tuple(p.data_ptr() for p in policy.parameters()))
            for ours, theirs in zip(policy.parameters(), model.parameters(), strict=True):
                assert torch.equal(ours, theirs)
        assert all((p.untyped_storage().size() > 0) == kept for p in whole.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
    # what is kept is not allocated again
    assert len(addresses) == 1 or not kept


def test_only_rank_0_decides_and_every_rank_is_told(monkeypatch):
    channel = []

    def broadcast(values, src):
        assert src == 0
        if values[0] is not None:
            channel[:] = values
        values[:] = channel

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert World(rank=0, size=2).told(lambda: "step 4") == "step 4"
    assert World(rank=1, size=2).told(lambda: pytest.fail("rank 1 decided")) == "step 4"
    assert World().told(lambda: "alone") == "alone"


def test_one_rank_of_each_machine_finds_a_model_for_its_neighbours(monkeypatch):
    """Four ranks on two machines, one after another: those with a neighbour below have to wait."""
    asked, said = [], {}

    def gathered(values, mine):
        said[world.rank] = mine
        values[:] = [said.get(rank) for rank in range(4)]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    found = []
    for rank in range(4):
        world = World(rank=rank, size=4, local_rank=rank % 2)
        found.append(world.found_here(lambda rank=rank: asked.append(rank) or f"machine {rank}"))
    assert asked == [0, 2]
    assert found == ["machine 0", "machine 0", "machine 2", "machine 2"]
    assert World().found_here(lambda: "alone") == "alone"


@pytest.mark.parametrize(
    "device, gpus, expected",
    [("cpu", True, "cpu"), ("auto", True, "cuda:1"), ("auto", False, "cpu")],
)
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert str(compute_device(device, local_rank=1)) == expected


def in_a_process_of_its_own(code: str) -> None:
    """Run statements after which a process group would stay."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_sharded_learner_in_bfloat16():
    """FSDP of one process, as on one GPU: a reference, a critic, adapters and a sampling copy."""
    in_a_process_of_its_own("""
        import gc
        import itertools
        import torch
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor
        from mar.learn.batch import make_batch, micro_batches
        from mar.learn.update import score_before_updates
        from mar.policy.distributed import World
        from mar.policy.lora import adapted
        from mar.policy.sources import EMBEDDED
        from mar.policy.weights import load_model
        from mar.run import setup
        from mar.run.compose import compose
        from mar.run.planning import empty_policy, memory_per_gpu
        from tests.learn.test_batch import FIRST_OPEN, fake_groups

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        # what is sharded on a CPU has two ranks: one that says so, and is alone in its mesh
        class Alone(World):
            share = slice(0, None, 1)
            def gather(self, mine): return mine
            def deal(self, items): return [(item, 1.0) for item in items]
        sharded_alone = setup.shard
        setup.shard = lambda model, _, scale: sharded_alone(model, World(), scale)
        def live_bytes():
            tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
            storages = [x.untyped_storage() for x in tensors if type(x) is not DTensor
                        and x.device.type == "cpu"]
            return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

        config = compose(["+experiment=clinic", "algo=ppo", "algo.kl_coef=0.1", "algo.epochs=2",
                          "model.lora_rank=4", "model.trainable=", "scale.dtype=bfloat16",
                          "scale.num_gpus=1"])
        held = []
        fill_one = setup.load_into
        def load_into(model, folder):
            held.append(live_bytes())
            fill_one(model, folder)
        setup.load_into = load_into
        before = live_bytes()
        learner = setup.build_learner(config, EMBEDDED, Alone(size=2))
        held.append(live_bytes())
        models = (learner.policy, learner.reference, learner.critic)

        # one model after another, then the copy: what mar.plan says
        said = memory_per_gpu(config, empty_policy(config))
        parts = said["bytes"]
        order = (parts["weights"], parts["reference"], parts["critic"], parts["sampling_copy"])
        for seen, planned in zip(held, itertools.accumulate(order), strict=True):
            assert 0 <= seen - before - planned < 4096, (seen - before, planned)
        assert said["peak_bytes"]["loading"] == sum(order)

        # filled: the weights of the folder, and the start of the adapters
        expected = dict(adapted(load_model(EMBEDDED), config.model).named_parameters())
        for name, parameter in learner.policy.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]), name
        for model in (learner.reference, learner.critic.trunk):
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter.full_tensor(), expected[name]), name
        assert not any(p.requires_grad for p in learner.reference.parameters())

        # the critic's values are not rounded to bfloat16
        learner.critic.value.bias.data.fill_(1.001)
        batch = make_batch(fake_groups(), FIRST_OPEN)
        columns = score_before_updates(learner, batch, 0)
        values = columns["values"][batch.completion_mask]
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.full_like(values, 1.001), rtol=0, atol=1e-6)

        # after passes without gradients nothing is left whole
        for model in models:
            assert all(isinstance(p, DTensor) for p in model.parameters())

        # the sampling copy is the trainer's policy to the bit, adapters apart
        with torch.no_grad():
            for name, parameter in learner.policy.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(std=1e-4)
        with learner.sampling_policy() as copy:
            for name, parameter in learner.policy.named_parameters():
                whole = parameter.full_tensor().bfloat16()
                assert torch.equal(dict(copy.named_parameters())[name], whole), name
            with torch.no_grad():
                packed = next(iter(micro_batches(batch, 10**6))).packed
                assert torch.equal(copy(packed)[0], learner.policy(packed)[0])
    """)


def test_a_rank_fills_its_own_rows():
    """7 rows on 3 ranks are 3, 3 and 1; of 2 rows the last rank has none. With HSDP as well."""
    in_a_process_of_its_own("""
        import itertools
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from mar.policy.weights import fill

        for shard, shape in itertools.product(range(3), ((3,), (2, 3))):
            size = 3 * len(shape)
            rank = shard if shape == (3,) else 3 + shard
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("r", "s")[-len(shape):])
            for rows in (7, 2):
                with torch.device("meta"):
                    layer = torch.nn.Linear(4, rows, bias=False)
                fully_shard(layer, mesh=mesh)
                layer.to_empty(device="cpu")
                whole = torch.arange(4.0 * rows).reshape(rows, 4)
                fill(layer.weight, whole)
                expected = [whole[:3], whole[3:6], whole[6:]]
                if rows == 2:
                    expected = [whole[:1], whole[1:], whole[:0]]
                assert torch.equal(layer.weight.to_local(), expected[shard])
            dist.destroy_process_group()
    """)


def test_micro_batches_are_dealt_in_equal_numbers():
    hands = [World(rank, 3).deal("abcd") for rank in range(3)]
    assert hands == [[("a", 3.0), ("d", 3.0)], [("b", 3.0), ("a", 0.0)], [("c", 3.0), ("a", 0.0)]]
    assert World().deal("ab") == [("a", 1.0), ("b", 1.0)]


def test_what_does_not_fit_the_machine_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for options, message in (
        (ScaleOptions("h100x8", 8), "scale=h100x8 wants 8 GPU"),
        (ScaleOptions("laptop", 0, replicas=2), "scale.replicas=2 does not divide the 1 processes"),
        (ScaleOptions("laptop", 0, dtype="bfloat16"), "take scale.dtype=float32"),
    ):
        with pytest.raises(UserError, match=message):
            join("cpu", options)
    # where there is a GPU, but one process alone
    monkeypatch.setattr(distributed, "compute_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(UserError, match="torchrun --nproc-per-node 8"):
        join("cuda", ScaleOptions("h100x8", 8))
