"""Memory of mar's own FSDP2 step without memory: fake tensors, a fake process group, and PyTorch's FSDPMemTracker, against mar.plan.

    python -m experiments.plan.fake_step [--model Qwen/Qwen3-8B] [--ranks 8] [--tokens 16384] [--lora-rank 16] [--no-checkpointing]

Runs mar.distributed.shard, the decoder over packed groups, the log-probabilities, backward and AdamW, twice, and takes the peak: the second pass
finds optimizer state and gradients, as a step's later micro-batches do. Clipping is left out: it keeps nothing and is slow under the tracker. Fake
tensors of a CPU take the CPU's paths: attention pads and repeats keys, norms are not fused and the block of logits is smaller than on a GPU. The
last line of stdout is one JSON document.
"""

import argparse
import json
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from mar.attention import pack_groups
from mar.config import ModelOptions, ScaleOptions
from mar.distributed import World, shard
from mar.job import adapted
from mar.model import Decoder, ModelConfig
from mar.optim import make_optimizer
from mar.plan import SHAPES, update_memory

PROMPT = 1 / 4  # of the tokens, the rest are 8 completions of equal length


def packed(tokens: int) -> Any:
    prompt = int(tokens * PROMPT)
    return pack_groups([[0] * prompt], [[[0] * ((tokens - prompt) // 8 + 1) for _ in range(8)]])


def fake_step(shape: ModelConfig, ranks: int, tokens: int, lora_rank: int, checkpointed: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    """Bytes of rank 0 at its peak by FSDPMemTracker's kinds, `Total` among them, beside what mar.plan computes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    options = ModelOptions(name="fake", source="hub", lr=1e-6, lora_rank=lora_rank)
    mode, adamw = FakeTensorMode(), (1e-6, (0.9, 0.999), 1e-8, 0.0, "lora_" if lora_rank else "")
    with mode:
        model = adapted(Decoder(shape), options)
        model.checkpoint_blocks = checkpointed
    shard(model, World(0, ranks), ScaleOptions(name="fake", dtype=dtype))  # a device mesh reads real ranks; its parameters stay fake
    with mode:
        optimizer = make_optimizer(model, *adamw)
        tracker = FSDPMemTracker(model, optimizer)
        batch = packed(tokens)
        tracker.track_inputs((batch.ids, batch.positions, batch.predict_from, batch.targets))
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()  # it counts one pass at a time; the peak is of all
                logprobs, *_ = model(batch)
                logprobs.sum().backward()
                del logprobs
                optimizer.step()  # gradients stay, as between micro-batches
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    dist.destroy_process_group()
    said = {str(getattr(kind, "value", kind)): int(size) for kind, size in peak.items()}
    with torch.device("meta"):
        plain = Decoder(shape)
    plain = adapted(plain, options)
    make_optimizer(plain, *adamw)
    size = getattr(torch, dtype).itemsize
    return {"tracked": said, "planned": update_memory(plain, len(batch.ids), ranks, checkpointed, size, max(4, size))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B", choices=SHAPES)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--no-checkpointing", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    document = fake_step(SHAPES[args.model], args.ranks, args.tokens, args.lora_rank, not args.no_checkpointing)
    for side, parts in document.items():
        print(side, "GiB:", ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items()))
    print(json.dumps({**vars(args), **document, "wall_s": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
