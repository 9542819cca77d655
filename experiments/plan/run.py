"""Plan Qwen3 on 1 and 8 GPUs, full and with adapters of rank 16, and track steps.

    python experiments/plan/run.py [0.6B 1.7B 4B 8B] [--planned]

For each size named (without one, for all), `mar.plan` of the paper's recipe at that scale and,
without `--planned`, `fake_step` of a micro-batch as large as the scale's. Replaces their rows in
results.json; `make report` makes the tables of README.md from it.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.common.tables import markdown_table
from mar.run.compose import compose
from mar.run.planning import plan

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
SIZES = ("0.6B", "1.7B", "4B", "8B")
GPUS = (1, 8)
# Of adapters; 0: all parameters are trained.
RANKS = (0, 16)
GIB = 2**30
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
    train = compose(words_of(size, gpus, rank)).train
    options = {
        "--model": f"Qwen/Qwen3-{size}",
        "--ranks": gpus,
        "--tokens": train.micro_batch_tokens,
        "--lora-rank": rank,
    }
    command = [sys.executable, str(HERE / "fake_step.py")]
    for option, value in options.items():
        command += [option, str(value)]
    if not train.checkpoint_activations:
        command.append("--no-checkpointing")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    return {**said["tracked"], "tokens": said["tokens"], "wall_s": said["wall_s"]}


def planned(row: dict[str, Any]) -> dict[str, int]:
    """The planner's bytes of a training step, in the parts that are tracked."""
    held = row["computed"]["bytes"]
    parts = {part: held[part] for part in ("weights", "gradients", "optimizer", "gathered")}
    parts["pass"] = held["activations"] + held["backward"] + held["reduce"]
    parts["total"] = sum(parts.values())
    return parts


def name_of(row: dict[str, Any]) -> list[str]:
    """The first cells of a run's line."""
    trained = "rank 16" if row["lora_rank"] else "all"
    return [row["model"], str(row["gpus"]), trained]


def markdown(which: str) -> str:
    """The `tracked` or the `computed` table."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return tracked_table(rows) if which == "tracked" else computed_table(rows)


def tracked_table(rows: list[dict[str, Any]]) -> str:
    """The steps that are tracked: GiB tracked / planned."""
    lines = []
    for row in rows:
        seen = row["tracked"]
        if not seen:
            continue
        computed = planned(row)
        cells = [f"{seen[part] / GIB:.2f} / {computed[part] / GIB:.2f}" for part in PARTS]
        off_by = computed["total"] / seen["total"] - 1
        lines.append([*name_of(row), *cells, f"{off_by:+.1%}"])
    return markdown_table(["model", "GPUs", "trained", *PARTS, "planned is off by"], lines)


def computed_table(rows: list[dict[str, Any]]) -> str:
    """All runs as a whole: GiB, and seconds of those that fit."""
    header = [
        "model",
        "GPUs",
        "trained",
        "sampling copy",
        "KV cache",
        "peak of sampling",
        "peak of the update",
        "fits",
        "largest group",
        "decode s",
        "update s",
        "step s",
        "GPU-hours",
    ]
    lines = []
    for row in rows:
        computed = row["computed"]
        held = computed["bytes"]
        peak = computed["peak_bytes"]
        sizes = (held["sampling_copy"], held["kv_cache"], peak["sampling"], peak["update"])
        line = [*name_of(row), *(f"{size / GIB:.1f}" for size in sizes)]
        if computed["fits"]:
            limit = "KV budget" if computed["kv_budget_binds"] else "memory"
            line += ["yes", f"{computed['largest_group']} ({limit})"]
            seconds = computed["seconds"]
            times = (seconds["decode"], seconds["update"], computed["step_s"])
            line += [f"{time:.0f}" for time in (*times, computed["gpu_hours"])]
        else:
            line += ["**no**", "–", "–", "–", "–", "–"]
        lines.append(line)
    return markdown_table(header, lines)


def main() -> None:
    sizes = [word for word in sys.argv[1:] if word in SIZES] or SIZES
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    found = {(row["model"], row["gpus"], row["lora_rank"]): row for row in rows}
    order = list(product([f"Qwen3-{size}" for size in SIZES], GPUS, RANKS))
    for size, gpus, rank in product(sizes, GPUS, RANKS):
        model = f"Qwen3-{size}"
        key = (model, gpus, rank)
        tracked = found[key]["tracked"] if key in found else None
        if "--planned" not in sys.argv:
            tracked = track(size, gpus, rank)
            total = tracked["total"] / GIB
            seconds = tracked["wall_s"]
            print(
                f"{model} on {gpus}, rank {rank}: {total:.2f} GiB tracked in {seconds} s",
                flush=True,
            )
        found[key] = {
            "model": model,
            "gpus": gpus,
            "lora_rank": rank,
            "tracked": tracked,
            "computed": plan(compose(words_of(size, gpus, rank))),
        }
        rows = [found[key] for key in order if key in found]
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
