"""What the compiler makes of every kernel, on a machine without a GPU:  python kernels/compile_report.py [--check]

The public functions run on tensors without storage, their launches are recorded, and each is compiled ahead of time as it would be on the GPU: types,
constants, tiles, alignment. Writes COMPILE.md. `--check` writes nothing and exits with 1 where a kernel for sm_80 or sm_90 does not compile, has a
stack (registers were spilled), multiplies without tensor cores or uses atomics, or where COMPILE.md is not what this version of triton gives.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mar_kernels import triton_advantages, triton_logprobs

REPORT = Path(__file__).with_name("COMPILE.md")
CHECKED, LISTED = (80, 90), (86, 89, 100, 120)
# KiB of shared memory and warps of a multiprocessor; the H100's dense FLOP/s (tf32x3 multiplies three times) and bytes/s.
SM = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
FLOPS = {torch.bfloat16: 989e12, torch.float32: 495e12 / 3}
HBM, L2 = 3.35e12, 5.5e12
N, D, V = 16_384, 2_048, 151_936  # tokens of a micro-batch; Qwen3-1.7B
B, T, C, S = 1_536, 1_536, 11, 12  # a step of the paper's recipe, with K = 5
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
MMA = re.compile(
    r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)\S*?(m\d+n\d+k\d+\S*?(?:bf16|tf32)|kind::\w+)"
)
MMA_TYPE = {torch.bfloat16: "f16", torch.float32: "tf32"}  # Blackwell names bf16 and f16 alike
OUTPUTS = (
    (0,),
    (0, 1),
    (2,),
    (1, 2),
)  # which of log-probability, entropy and log-sum-exp a loss uses
CHOICES = (
    ("to_go", "leave_one_out", "none"),
    ("set", "mean", "group_std"),
    ("own", "none", "batch_std"),
)
ABOUT = """# What the compiler makes of the kernels

Written by `python kernels/compile_report.py` with {version}; `--check` fails on a stack (spilled registers), a missing tensor-core instruction,
atomics or a failed compilation for sm_80 and sm_90. The other architectures are listed. No GPU has run this: **the times are a model, not measured**:
the slowest of FLOPs at the H100's dense peak (989 TFLOP/s in bf16, a third of 495 in tf32x3), the bytes of every operand once at 3.35 TB/s, and what
the tiles load and store at 5.5 TB/s of L2. Each line is the first launch of its kind: {N} tokens of Qwen3-1.7B (D {D}, V {V}), forward (`sums`) over
the whole vocabulary, backward (`grads`, beside two products by cuBLAS) over one block; advantages of {B} completions of {T} tokens, {C} components.
"""
HEADER = """| kernel | sm | registers | stack | shared KiB | occupancy | tensor cores | GFLOP | MB, each once | MB to the SMs | H100 ms, model |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass
class Launch:
    """A kernel with its arguments by name; tensors are on the meta device."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    capability: int

    @property
    def multiplies(self) -> bool:
        return self.arguments.get("weight") is not None

    @property
    def name(self) -> str:
        kind = next(x.dtype for x in self.arguments.values() if isinstance(x, Tensor))
        used = [n for n in ("of_target", "of_entropy") if self.arguments.get(n) is not None]
        chosen = [
            str(self.arguments[n]) for n in ("CREDIT", "BASELINE", "SCALE") if n in self.arguments
        ]
        read = ["logits"] if "hidden" in self.arguments and not self.multiplies else []
        return " ".join(
            [self.kernel.__name__.removesuffix("_kernel"), TYPES[kind][1:], *read, *used, *chosen]
        )


class Recorder:
    """Stands where a kernel is: `recorder[grid](...)` notes the launch, once for all that compile to the same."""

    def __init__(self, kernel: Any, capability: int, found: dict[str, Launch]) -> None:
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        made = Launch(
            self.kernel, named, {"num_warps": num_warps, "num_stages": num_stages}, self.capability
        )
        self.found.setdefault(f"{source_of(made).hash()} {made.options}", made)


def launches(capability: int) -> list[Launch]:
    """All that the public functions start on a GPU of this compute capability."""
    found: dict[str, Launch] = {}

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    with ExitStack() as patches:
        patches.enter_context(
            patch.object(torch.cuda, "get_device_capability", lambda _: divmod(capability, 10))
        )
        for module in (triton_logprobs, triton_advantages):
            for name, kernel in [(n, k) for n, k in vars(module).items() if n.endswith("_kernel")]:
                patches.enter_context(
                    patch.object(module, name, Recorder(kernel, capability, found))
                )
        for dtype in FLOPS:
            for used in OUTPUTS:
                leaves = [empty(n, D, dtype=dtype).requires_grad_() for n in (N, V)]
                outputs = triton_logprobs.linear_logprobs(*leaves, empty(N), 0.7)
                torch.autograd.grad(
                    [outputs[i] for i in used], leaves, [empty(N, dtype=torch.float32)] * len(used)
                )
            logits = empty(N, V, dtype=dtype).requires_grad_()
            torch.autograd.grad(
                triton_logprobs.selected_logprobs(logits, empty(N)), logits, empty(N, dtype=dtype)
            )
        for dtype, choices in product((torch.float64, torch.float32), CHOICES):
            rewards = empty(B, C, dtype=dtype), empty(C, dtype=dtype)
            triton_advantages.answer_advantages(
                *rewards, empty(B, S), empty(B, T), empty(B), *choices
            )
    return list(found.values())


def source_of(launch: Launch) -> ASTSource:
    """What to compile: types, constants and alignments, as triton's launcher takes them from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[Any]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        fixed = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (fixed and name not in constants and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compile_launch(launch: Launch) -> tuple[list[str], list[str]]:
    """The row of the report and what is wrong with the kernel."""
    target = GPUTarget("cuda", launch.capability, 32)
    try:
        made = triton.compile(source_of(launch), target=target, options=launch.options)
    except Exception as error:  # the compiler's own, of any kind: the report is about them
        return [launch.name, f"sm_{launch.capability}", "failed"], [f"does not compile: {error}"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    (room, most), warps, shared = (
        SM[launch.capability],
        launch.options["num_warps"],
        made.metadata.shared,
    )
    blocks = min(
        (1 << 16) // (warps * -(-registers * 32 // 256) * 256),
        (room << 10) // (shared + 1024),
        most // warps,
    )
    mma = sorted({" ".join(m) for m in MMA.findall(made.asm["ptx"])})
    problems = [f"a stack of {stack} bytes: registers were spilled"] if stack else []
    problems += (
        [f"ptxas -v: {spilled} bytes spilled"]
        if (spilled := spilled_bytes(made.asm["ptx"], launch.capability))
        else []
    )
    if launch.multiplies and not any(
        m.endswith(MMA_TYPE[launch.arguments["hidden"].dtype]) for m in mma
    ):
        problems.append("multiplies without the tensor cores for its type")
    problems += ["uses atomics"] if re.search(r"\b(atom|red)\.", made.asm["ptx"]) else []
    counts = [
        registers,
        stack,
        f"{shared / 1024:.0f}",
        f"{blocks * warps / most:.0%}",
        ", ".join(mma) or "–",
    ]
    return [launch.name, f"sm_{launch.capability}", *map(str, counts), *work(launch)], problems


def spilled_bytes(ptx: str, capability: int) -> int | None:
    """Stores and loads that `ptxas -v` counts as spills; None where the ptxas that triton brings does not read this PTX."""
    flags = [
        "-v",
        f"--gpu-name=sm_{capability}{'a' * (capability >= 90)}",
        "-o",
        "/dev/null",
        "/dev/stdin",
    ]
    done = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, *flags],
        input=ptx,
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode else sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def work(launch: Launch) -> list[str]:
    """GFLOP, megabytes when each operand moves once, megabytes that the tiles load and store, and the time that the slowest of the three takes."""
    a = launch.arguments
    tensors = {k: x for k, x in a.items() if isinstance(x, Tensor)}
    size = {k: x.numel() * x.element_size() for k, x in tensors.items()}
    flops, loaded = 0, sum(size.values())
    if launch.multiplies:
        columns = a["block"].shape[1] if "block" in a else V
        size["weight"] = columns * D * a["weight"].element_size()
        flops = 2 * N * D * columns
        again = -(-columns // a["COLUMNS"]) * size["hidden"] + -(-N // a["ROWS"]) * size["weight"]
        loaded = sum(size.values()) - size["hidden"] - size["weight"] + again
    elif "components" in a:
        loaded += (B - 1) * (size["components"] + size["group_ids"])
    once = sum(size.values())
    seconds = max(flops / FLOPS.get(next(iter(tensors.values())).dtype, 1), once / HBM, loaded / L2)
    model = f"{seconds * 1e3:.3f}" if launch.capability == 90 else ""
    return [f"{flops / 1e9:.0f}", f"{once / 1e6:.0f}", f"{loaded / 1e6:.0f}", model]


def main() -> int:
    check = "--check" in sys.argv[1:]
    rows: list[str] = []
    problems: list[str] = []
    for capability in CHECKED if check else CHECKED + LISTED:
        for launch in launches(capability):
            row, wrong = compile_launch(launch)
            rows.append(f"| {' | '.join(row)} |")
            problems += [f"{row[0]} on {row[1]}: {text}" for text in wrong if capability in CHECKED]
    version = f"triton {triton.__version__}"
    if not check:
        about = ABOUT.format(version=version, N=N, D=D, V=V, B=B, T=T, C=C)
        REPORT.write_text("\n".join([about, HEADER, *rows, ""]), encoding="utf-8")
    elif version in (written := REPORT.read_text(encoding="utf-8")) and any(
        row not in written for row in rows
    ):
        problems.append(
            f"{REPORT.name} is not what {version} gives: run python kernels/compile_report.py"
        )
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
