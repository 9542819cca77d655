"""Plan Qwen3 on 1 and 8 GPUs, full and with adapters of rank 16, and track steps:  python experiments/plan/run.py [0.6B 1.7B 4B 8B] [--planned]

For each size named (all, if none is), `mar.plan` of the paper's recipe at that scale and, without `--planned`, `fake_step` of a micro-batch as large
as the scale's. Puts them into results.json in place of what it says of that; `make report` makes the tables of README.md from it.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mar.run.compose import compose
from mar.run.planning import plan

HERE = Path(__file__).resolve().parent
RESULTS, SIZES, RANKS, GIB = HERE / "results.json", ("0.6B", "1.7B", "4B", "8B"), (0, 16), 2**30
PARTS = ("weights", "gradients", "optimizer", "gathered", "pass", "total")


def words_of(size: str, gpus: int, rank: int) -> list[str]:
    """What to say to mar.plan, and to mar.train, for a run."""
    return [
        "+experiment=paper",
        f"scale=h100x{gpus}",
        "model=qwen3-8b",
        f"model.path=Qwen/Qwen3-{size}",
        f"model.lora_rank={rank}",
    ]


def track(size: str, gpus: int, rank: int) -> dict[str, Any]:
    """What FSDP's tracker counts in a step of that run, in a process of its own."""
    config = compose(words_of(size, gpus, rank))
    step = [
        "--model",
        f"Qwen/Qwen3-{size}",
        "--ranks",
        gpus,
        "--tokens",
        config.train.micro_batch_tokens,
        "--lora-rank",
        rank,
    ]
    keep = [] if config.train.checkpoint_activations else ["--no-checkpointing"]
    done = subprocess.run(
        [sys.executable, HERE / "fake_step.py", *map(str, step), *keep],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    return {**said["tracked"], "tokens": said["tokens"], "wall_s": said["wall_s"]}


def planned(row: dict[str, Any]) -> dict[str, int]:
    """The planner's bytes of a training step, in the parts that are tracked."""
    held = row["computed"]["bytes"]
    parts = {part: held[part] for part in PARTS[:4]} | {
        "pass": held["activations"] + held["backward"] + held["reduce"]
    }
    return parts | {"total": sum(parts.values())}


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]
    )


def markdown(which: str) -> str:
    """The `tracked` table of the steps that are tracked, a cell being GiB tracked / planned, or the `computed` one of all runs."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if which == "computed" or row["tracked"]]
    named = [
        [row["model"], str(row["gpus"]), "rank 16" if row["lora_rank"] else "all"] for row in rows
    ]
    if which == "tracked":
        pairs = [(row["tracked"], planned(row)) for row in rows]
        cells = [
            [f"{seen[part] / GIB:.2f} / {said[part] / GIB:.2f}" for part in PARTS]
            for seen, said in pairs
        ]
        off = [f"{said['total'] / seen['total'] - 1:+.1%}" for seen, said in pairs]
        lines = [[*name, *line, error] for name, line, error in zip(named, cells, off, strict=True)]
        return table(["model", "GPUs", "trained", *PARTS, "planned is off by"], lines)
    lines = []
    for name, row in zip(named, rows, strict=True):
        c = row["computed"]
        sizes = [
            c["bytes"]["sampling_copy"],
            c["bytes"]["kv_cache"],
            c["peak_bytes"]["sampling"],
            c["peak_bytes"]["update"],
        ]
        group = (
            f"{c['largest_group']} ({'KV budget' if c['kv_budget_binds'] else 'memory'})"
            if c["fits"]
            else "–"
        )
        times = [f"{c['seconds'][part]:.0f}" for part in ("decode", "update")] + [
            f"{c['step_s']:.0f}",
            f"{c['gpu_hours']:.0f}",
        ]
        lines.append(
            [
                *name,
                *(f"{n / GIB:.1f}" for n in sizes),
                "yes" if c["fits"] else "**no**",
                group,
                *(times if c["fits"] else "––––"),
            ]
        )
    memory = [
        "sampling copy",
        "KV cache",
        "peak of sampling",
        "peak of the update",
        "fits",
        "largest group",
    ]
    return table(
        ["model", "GPUs", "trained", *memory, "decode s", "update s", "step s", "GPU-hours"], lines
    )


def main() -> None:
    sizes = [word for word in sys.argv[1:] if word in SIZES] or SIZES
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    found = {(row["model"], row["gpus"], row["lora_rank"]): row for row in rows}
    for size, gpus, rank in product(sizes, (1, 8), RANKS):
        key = f"Qwen3-{size}", gpus, rank
        seen = found[key]["tracked"] if key in found else None
        if "--planned" not in sys.argv:
            seen = track(size, gpus, rank)
            print(
                f"{key[0]} on {gpus}, rank {rank}: {seen['total'] / GIB:.2f} GiB tracked in {seen['wall_s']} s",
                flush=True,
            )
        computed = plan(compose(words_of(size, gpus, rank)))
        found[key] = {
            "model": key[0],
            "gpus": gpus,
            "lora_rank": rank,
            "tracked": seen,
            "computed": computed,
        }
        rows = [
            found[key]
            for key in product([f"Qwen3-{size}" for size in SIZES], (1, 8), RANKS)
            if key in found
        ]
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
