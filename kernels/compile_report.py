"""What the compiler makes of every kernel, on a machine without a GPU.

    python kernels/compile_report.py [--check]

The public functions run on tensors without storage, their launches are recorded, and each is
compiled ahead of time as it would be on the GPU: types, constants, tiles, alignment. Writes
COMPILE.md.

`--check` writes nothing. It exits with 1 where a kernel for sm_80 or sm_90 does not compile, has a
stack (registers were spilled), multiplies without tensor cores or uses atomics, or where COMPILE.md
is not what this version of triton gives.
"""

import math
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

from mar_kernels import LayerCache, triton_advantages, triton_decode, triton_logprobs

REPORT = Path(__file__).with_name("COMPILE.md")

# compute capabilities: those that `--check` checks, and those that the report lists besides
CHECKED = (80, 90)
LISTED = (86, 89, 100, 120)

# of a multiprocessor: KiB of shared memory, warps
SM = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
REGISTERS = 1 << 16  # of a multiprocessor
REGISTERS_PER_BLOCK = 256  # a warp's registers are handed out in blocks of so many
RESERVED_SHARED_BYTES = 1024  # of every thread block

# the H100's dense FLOP/s (tf32x3 multiplies three times), and bytes/s of memory and L2 cache
FLOPS = {torch.bfloat16: 989e12, torch.float32: 495e12 / 3}
HBM = 3.35e12
L2 = 5.5e12

# the sizes of the report: tokens of a micro-batch and Qwen3-1.7B; a step of the paper's recipe
# with K = 5
M, D, V = 16_384, 2_048, 151_936
B, T, C, S = 1_536, 1_536, 11, 12
# a decode step at the paper's lengths: prompts and their tokens, completions of each and theirs
PROMPTS, PROMPT_TOKENS, GROUP, OWN_TOKENS = 3, 3_072, 32, 1_536
# (query heads, key heads, channels) of Qwen3-1.7B, SmolLM2-135M and Phi-3-mini
HEADS = ((16, 8, 128), (9, 3, 64), (32, 32, 96))

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
MMA = re.compile(
    r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)\S*?(m\d+n\d+k\d+\S*?(?:bf16|tf32)|kind::\w+)"
)
# how an instruction's name ends for a type; Blackwell calls bf16 and f16 by one name
MMA_TYPE = {torch.bfloat16: "f16", torch.float32: "tf32"}

# which of (log-probability, entropy, log-sum-exp) a loss uses: each set is a launch of its own
OUTPUTS = ((0,), (0, 1), (2,), (1, 2))

# (credit, baseline, scale): every value once
CHOICES = (
    ("to_go", "leave_one_out", "none"),
    ("set", "mean", "group_std"),
    ("own", "none", "batch_std"),
)

ABOUT = """# What the compiler makes of the kernels

Written by `python kernels/compile_report.py` with {version}; `--check` fails on a stack (spilled
registers), a missing tensor-core instruction, atomics or a failed compilation for sm_80 and sm_90.
The other architectures are listed. No GPU has run this: **the times are a model, not measured**:
the slowest of FLOPs at the H100's dense peak (989 TFLOP/s in bf16, a third of 495 in tf32x3), the
bytes of every operand once at 3.35 TB/s, and what the tiles load and store at 5.5 TB/s of L2. Each
line is the first launch of its kind: {M} tokens of Qwen3-1.7B (D {D}, V {V}), forward (`sums`) over
the whole vocabulary, backward (`grads`, beside two products by cuBLAS) over one block; advantages
of {B} completions of {T} tokens, {C} components; a decode step's attention to prompts (`prompt`) and
own tokens (`own`), {rows} rows of {prompts} prompts, {prompt_tokens} and {own_tokens} tokens long (query
heads a key head x channels), and its norm and rotation (`rotate`).
"""
HEADER = """\
| kernel | sm | registers | stack | shared KiB | occupancy | tensor cores \
| GFLOP | MB, each once | MB to the SMs | H100 ms, model |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass
class Launch:
    """A kernel with its arguments by name; tensors are on the meta device."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    capability: int

    @property
    def attends(self) -> bool:
        return "keys" in self.arguments

    @property
    def multiplies(self) -> bool:
        return self.attends or self.arguments.get("weight") is not None

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.arguments.values() if isinstance(x, Tensor))

    @property
    def name(self) -> str:
        words = [self.kernel.__name__.removesuffix("_kernel"), TYPES[self.dtype].removeprefix("*")]
        if self.attends:
            words.append(f"{self.arguments['HEADS']} x {self.arguments['WIDTH']}")
        if self.arguments.get("q_weight") is not None:
            words.append("normed")
        if "hidden" in self.arguments and not self.multiplies:
            words.append("logits")
        for gradient in ("of_target", "of_entropy"):
            if self.arguments.get(gradient) is not None:
                words.append(gradient)
        for choice in ("CREDIT", "BASELINE", "SCALE"):
            if choice in self.arguments:
                words.append(str(self.arguments[choice]))
        return " ".join(words)


class Recorder:
    """Stands in for a kernel: `recorder[grid](...)` notes the launch.

    Launches that compile to the same are noted once.
    """

    def __init__(self, kernel: Any, capability: int, found: dict[str, Launch]) -> None:
        self.kernel = kernel
        self.capability = capability
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        options = {"num_warps": num_warps, "num_stages": num_stages}
        launch = Launch(self.kernel, arguments, options, self.capability)
        self.found.setdefault(f"{source_of(launch).hash()} {options}", launch)


def without_storage(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(capability: int) -> list[Launch]:
    """All that the public functions start on a GPU of this compute capability."""
    found: dict[str, Launch] = {}
    with ExitStack() as patches:
        patches.enter_context(
            patch.object(torch.cuda, "get_device_capability", lambda _: divmod(capability, 10))
        )
        for module in (triton_logprobs, triton_advantages, triton_decode):
            kernels = {n: x for n, x in vars(module).items() if n.endswith("_kernel")}
            for name, kernel in kernels.items():
                recorder = Recorder(kernel, capability, found)
                patches.enter_context(patch.object(module, name, recorder))
        for dtype in FLOPS:
            start_logprobs(dtype)
        # one shape is enough where kernels are only listed
        shapes = HEADS if capability in CHECKED else HEADS[:1]
        for dtype, heads in product(FLOPS, shapes):
            start_decode(dtype, *heads)
        for dtype, choices in product((torch.float64, torch.float32), CHOICES):
            triton_advantages.answer_advantages(
                without_storage(B, C, dtype=dtype),
                without_storage(C, dtype=dtype),
                without_storage(B, S),
                without_storage(B, T),
                without_storage(B),
                *choices,
            )
    return list(found.values())


def start_logprobs(dtype: torch.dtype) -> None:
    """Forward and backward of linear_logprobs, for each of OUTPUTS, and of selected_logprobs."""
    targets = without_storage(M)
    for used in OUTPUTS:
        hidden = without_storage(M, D, dtype=dtype).requires_grad_()
        weight = without_storage(V, D, dtype=dtype).requires_grad_()
        outputs = triton_logprobs.linear_logprobs(hidden, weight, targets, 0.7)
        upstream = without_storage(M, dtype=torch.float32)
        torch.autograd.grad([outputs[i] for i in used], (hidden, weight), [upstream for _ in used])
    logits = without_storage(M, V, dtype=dtype).requires_grad_()
    logprobs = triton_logprobs.selected_logprobs(logits, targets)
    torch.autograd.grad(logprobs, logits, without_storage(M, dtype=dtype))


def start_decode(dtype: torch.dtype, H: int, KV: int, d: int) -> None:
    """Attention of a decode step, whose q, k and v are parts of one tensor; norm and rotation."""
    rows = PROMPTS * GROUP
    q, k, v = without_storage(rows, H + 2 * KV, d, dtype=dtype).split((H, KV, KV), 1)
    cache = LayerCache(
        prompt_keys=without_storage(PROMPTS, KV, PROMPT_TOKENS, d, dtype=dtype),
        prompt_values=without_storage(PROMPTS, KV, PROMPT_TOKENS, d, dtype=dtype),
        own_keys=without_storage(rows, KV, OWN_TOKENS, d, dtype=dtype),
        own_values=without_storage(rows, KV, OWN_TOKENS, d, dtype=dtype),
        prompt_lengths=without_storage(PROMPTS),
        own_lengths=without_storage(rows),
        row_prompt=without_storage(rows),
        members=without_storage(PROMPTS, GROUP),
        member_index=without_storage(rows),
    )
    triton_decode.decode_attention(q, k, v, cache)
    if d == HEADS[0][2]:
        angles = without_storage(rows, 1, d, dtype=dtype)
        gains = without_storage(d, dtype=dtype)
        qk = without_storage(rows, H + 2 * KV, d, dtype=dtype)[:, : H + KV]
        triton_decode.rotated_heads(qk, angles, angles, H)
        triton_decode.rotated_heads(qk, angles, angles, H, gains, gains, eps=1e-6)


def source_of(launch: Launch) -> ASTSource:
    """What to compile: types, constants and alignments, as triton's launcher takes them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[Any]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        is_one = specialised and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compile_launch(launch: Launch) -> tuple[list[str], list[str]]:
    """The row of the report, and what is wrong with the kernel."""
    target = GPUTarget("cuda", launch.capability, 32)
    first_columns = [launch.name, f"sm_{launch.capability}"]
    try:
        compiled = triton.compile(source_of(launch), target=target, options=launch.options)
    except Exception as error:  # the compiler's own, of any kind: the report is about them
        return [*first_columns, "failed"], [f"does not compile: {error}"]
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    tensor_cores = sorted({" ".join(match) for match in MMA.findall(ptx)})

    problems = []
    if stack > 0:
        problems.append(f"a stack of {stack} bytes: registers were spilled")
    spilled = spilled_bytes(ptx, launch.capability)
    if spilled:
        problems.append(f"ptxas -v: {spilled} bytes spilled")
    if launch.multiplies:
        ending = MMA_TYPE[launch.dtype]
        if not any(instruction.endswith(ending) for instruction in tensor_cores):
            problems.append("multiplies without the tensor cores for its type")
    if re.search(r"\b(atom|red)\.", ptx):
        problems.append("uses atomics")

    row = [
        *first_columns,
        str(registers),
        str(stack),
        f"{shared / 1024:.0f}",
        f"{occupancy(launch, registers, shared):.0%}",
        ", ".join(tensor_cores) or "–",
        *work(launch),
    ]
    return row, problems


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack)


def occupancy(launch: Launch, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that run at once; whatever runs out first limits it."""
    shared_kib, max_warps = SM[launch.capability]
    num_warps = launch.options["num_warps"]
    registers_of_warp = -(-registers * 32 // REGISTERS_PER_BLOCK) * REGISTERS_PER_BLOCK
    num_blocks = min(
        REGISTERS // (num_warps * registers_of_warp),
        (shared_kib << 10) // (shared + RESERVED_SHARED_BYTES),
        max_warps // num_warps,
    )
    return num_blocks * num_warps / max_warps


def spilled_bytes(ptx: str, capability: int) -> int | None:
    """Stores and loads that `ptxas -v` counts as spills.

    None where the ptxas that triton brings does not read this PTX.
    """
    architecture = f"sm_{capability}"
    if capability >= 90:
        architecture += "a"
    ptxas = triton.knobs.nvidia.ptxas.path
    command = [ptxas, "-v", f"--gpu-name={architecture}", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", done.stderr))


def work(launch: Launch) -> list[str]:
    """GFLOP; megabytes when each operand moves once; megabytes that the tiles load and store; and
    the milliseconds that the slowest of the three takes on an H100.
    """
    arguments = launch.arguments
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    num_bytes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    flops = 0
    loaded = sum(num_bytes.values())
    if launch.attends:
        width = arguments["mixed"].shape[-1]
        tokens = arguments["keys"].shape[2]
        # of each query head of each row: a score and a share of the values for each token
        flops = 4 * math.prod(arguments["q"].shape[:2]) * width * tokens
        if "own_lengths" not in arguments:
            # keys and values are read once for each tile of a prompt's rows
            tiles = -(-GROUP * arguments["HEADS"] // arguments["ROWS"])
            loaded += (tiles - 1) * (num_bytes["keys"] + num_bytes["values"])
    elif launch.multiplies:
        columns = V
        if "block" in arguments:
            columns = arguments["block"].shape[1]
        num_bytes["weight"] = columns * D * arguments["weight"].element_size()
        flops = 2 * M * D * columns
        # hidden is read once for each tile of columns, the weight once for each tile of rows
        column_tiles = -(-columns // arguments["COLUMNS"])
        row_tiles = -(-M // arguments["ROWS"])
        others = sum(num_bytes.values()) - num_bytes["hidden"] - num_bytes["weight"]
        loaded = others + column_tiles * num_bytes["hidden"] + row_tiles * num_bytes["weight"]
    elif "components" in arguments:
        # every program, one for each completion, reads them all
        loaded += (B - 1) * (num_bytes["components"] + num_bytes["group_ids"])
    once = sum(num_bytes.values())

    dtype = next(iter(tensors.values())).dtype
    seconds = max(flops / FLOPS.get(dtype, 1), once / HBM, loaded / L2)
    milliseconds = ""
    if launch.capability == 90:
        milliseconds = f"{seconds * 1e3:.3f}"
    return [f"{flops / 1e9:.0f}", f"{once / 1e6:.0f}", f"{loaded / 1e6:.0f}", milliseconds]


def main() -> int:
    check = "--check" in sys.argv[1:]
    capabilities = CHECKED if check else CHECKED + LISTED
    rows: list[str] = []
    problems: list[str] = []
    for capability in capabilities:
        for launch in launches(capability):
            row, wrong = compile_launch(launch)
            rows.append(f"| {' | '.join(row)} |")
            if capability in CHECKED:
                problems += [f"{row[0]} on {row[1]}: {text}" for text in wrong]
    version = f"triton {triton.__version__}"
    if check:
        written = REPORT.read_text(encoding="utf-8")
        # another version of triton may well give other rows
        if version in written and any(row not in written for row in rows):
            problems.append(
                f"{REPORT.name} is not what {version} gives: run python kernels/compile_report.py"
            )
    else:
        about = ABOUT.format(
            version=version,
            M=M,
            D=D,
            V=V,
            B=B,
            T=T,
            C=C,
            rows=PROMPTS * GROUP,
            prompts=PROMPTS,
            prompt_tokens=PROMPT_TOKENS,
            own_tokens=OWN_TOKENS,
        )
        REPORT.write_text("\n".join([about, HEADER, *rows, ""]), encoding="utf-8")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
