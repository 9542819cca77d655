"""Plan and track Qwen3 on 1 and 8 GPUs, full and with adapters of rank 16:  python experiments/plan/run.py [0.6B 1.7B 4B 8B]

For each, `mar.plan` of the paper's recipe at that scale, and `fake_step` of a micro-batch as large as the scale's. Puts them into results.json in
place of what it says of these models; `make report` makes the tables of README.md from it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mar.compose import compose
from mar.plan import plan

HERE = Path(__file__).resolve().parent
RESULTS, SIZES, RANKS, GIB = HERE / "results.json", ("0.6B", "1.7B", "4B", "8B"), (0, 16), 2**30
PARTS = ("weights", "gradients", "optimizer", "gathered", "pass", "total")


def words_of(size: str, gpus: int, rank: int) -> list[str]:
    """What to say to mar.plan, and to mar.train, for a run."""
    return ["+experiment=paper", f"scale=h100x{gpus}", "model=qwen3-8b", f"model.path=Qwen/Qwen3-{size}", f"model.lora_rank={rank}"]


def measure(size: str, gpus: int, rank: int) -> dict[str, Any]:
    """The row of one run, its tracked step made by a process of its own."""
    config = compose(words_of(size, gpus, rank))
    step = ["--model", f"Qwen/Qwen3-{size}", "--ranks", gpus, "--tokens", config.train.micro_batch_tokens, "--lora-rank", rank]
    keep = [] if config.train.checkpoint_activations else ["--no-checkpointing"]
    done = subprocess.run([sys.executable, HERE / "fake_step.py", *map(str, step), *keep], stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    row = {"model": f"Qwen3-{size}", "gpus": gpus, "lora_rank": rank, "tokens": said["tokens"], "wall_s": said["wall_s"]}
    return {**row, "tracked": said["tracked"], "planned": said["planned"], "computed": plan(config)}


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def markdown(which: str) -> str:
    """The `tracked` table, a cell being GiB tracked / planned, or the `computed` one."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    named = [[row["model"], str(row["gpus"]), "rank 16" if row["lora_rank"] else "all"] for row in rows]
    if which == "tracked":
        cells = [[f"{row['tracked'][part] / GIB:.2f} / {row['planned'][part] / GIB:.2f}" for part in PARTS] for row in rows]
        off = [f"{row['planned']['total'] / row['tracked']['total'] - 1:+.1%}" for row in rows]
        lines = [[*name, *line, error] for name, line, error in zip(named, cells, off, strict=True)]
        return table(["model", "GPUs", "trained", *PARTS, "planned is off by"], lines)
    lines = []
    for name, row in zip(named, rows, strict=True):
        c = row["computed"]
        sizes = [c["bytes"]["sampling_copy"], c["bytes"]["kv_cache"], c["peak_bytes"]["sampling"], c["peak_bytes"]["update"]]
        group = f"{c['largest_group']} ({'KV budget' if c['kv_budget_binds'] else 'memory'})" if c["fits"] else "–"
        times = [f"{c['seconds'][part]:.0f}" for part in ("decode", "update")] + [f"{c['step_s']:.0f}", f"{c['gpu_hours']:.0f}"]
        lines.append(
            [*name, *(f"{n / GIB:.1f}" for n in sizes), "yes" if c["fits"] else "**no**", group, *(times if c["fits"] else "––––")]
        )
    memory = ["sampling copy", "KV cache", "peak of sampling", "peak of the update", "fits", "largest group"]
    return table(["model", "GPUs", "trained", *memory, "decode s", "update s", "step s", "GPU-hours"], lines)


def main() -> None:
    sizes = sys.argv[1:] or SIZES
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    found = {(row["model"], row["gpus"], row["lora_rank"]): row for row in old}
    order = [(f"Qwen3-{size}", gpus, rank) for size in SIZES for gpus in (1, 8) for rank in RANKS]
    for size in sizes:
        for gpus in (1, 8):
            for rank in RANKS:
                row = found[f"Qwen3-{size}", gpus, rank] = measure(size, gpus, rank)
                rows = [found[key] for key in order if key in found]
                RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
                print(
                    f"Qwen3-{size} on {gpus}, rank {rank}: {row['tracked']['total'] / GIB:.2f} GiB tracked in {row['wall_s']} s", flush=True
                )


if __name__ == "__main__":
    main()
