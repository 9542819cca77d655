"""The main job on the device: interrupted, resumed, its table beside the CPU's, and its export."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.gpu.measuring import ROOT, Place, Record

CPU_LOG = ROOT / "experiments/first_light/clinic_seed0.log"
SHOWN = ("coverage@3", "top1", "ece", "q_mse", "format_rate")
# Another order of sums makes another run: seeds differ by about so much.
GAP_CLOSED_TOLERANCE = 0.15
INTERRUPTED = 130


def measure(place: Place, record: Record) -> None:
    steps = place.size(200, 4)
    with tempfile.TemporaryDirectory() as scratch:
        words = [
            "+experiment=clinic",
            f"device={place.device.type}",
            f"train.steps={steps}",
            f"out={scratch}",
            "logger.console=plain",
        ]
        if place.tiny:
            words += ["algo.prompts_per_step=2", "eval.num_items=8", "model.threads=1"]
        began = time.perf_counter()
        record.attempt("interrupted", lambda: interrupt(words, Path(scratch), steps // 2, record))
        document = resume(words)
        record("interrupted and resumed, both", time.perf_counter() - began, "s")
        run = Path(scratch) / "clinic/seed0"
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        record.check("every step stands once", len(rows) == steps, f"{len(rows)} of {steps}")
        seconds = [sum_of_parts(json.loads(row)) for row in rows]
        record("a step, median", sorted(seconds)[len(seconds) // 2], "s")
        beside_the_cpu(place, document, record)
        record.attempt("export", lambda: export(run, Path(scratch) / "exported", record))


def sum_of_parts(row: dict[str, Any]) -> float:
    return sum(row[f"perf/{part}_s"] for part in ("sample", "verify", "update"))


def command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def interrupt(words: list[str], scratch: Path, after: int, record: Record) -> None:
    """Ctrl-C once `after` steps are written."""
    metrics = scratch / "clinic/seed0/metrics.jsonl"
    process = subprocess.Popen(
        command("mar.train", *words),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= after:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    _, errors = process.communicate()
    code = process.returncode
    found = f"exit code {code}" if code == INTERRUPTED else f"{code}: {last_line(errors)}"
    record.check("Ctrl-C is an orderly end", code == INTERRUPTED, found)


def resume(words: list[str]) -> dict[str, Any]:
    """The same command again; returns the document that it ends with."""
    done = subprocess.run(
        command("mar.train", *words), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"mar.train ended with {done.returncode}: {last_line(done.stderr)}")
    return json.loads(last_line(done.stdout))


def beside_the_cpu(place: Place, document: dict[str, Any], record: Record) -> None:
    """The table of the same job, and the CPU's of seed 0."""
    on_cpu = json.loads(last_line(CPU_LOG.read_text(encoding="utf-8")))
    for name in SHOWN:
        for when in ("before", "after"):
            found, expected = document[when][name], on_cpu[when][name]
            record(f"{name} {when} (on a CPU {expected:.3f})", found)
    found, expected = document["gap_closed"], on_cpu["gap_closed"]
    record(f"gap_closed (on a CPU {expected:.3f})", found)
    if not place.tiny:
        record("gap_closed below the CPU's", expected - found, at_most=GAP_CLOSED_TOLERANCE)


def export(run: Path, exported: Path, record: Record) -> None:
    """The exported policy in transformers: it is read, and writes finite logits."""
    done = subprocess.run(
        command("mar.export", str(run), f"out={exported}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"mar.export ended with {done.returncode}: {last_line(done.stderr)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("fever", return_tensors="pt")["input_ids"]
    finite = bool(torch.isfinite(model(ids).logits).all())
    record.check("transformers reads the export", finite, f"finite logits: {finite}")
