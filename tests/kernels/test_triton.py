"""The Triton kernels of the update against the reference in float64; those of decoding are in
test_decode.py.
"""

import itertools
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mar_kernels
from mar_kernels import answer_advantages, linear_logprobs, reference, selected_logprobs
from tests.helpers.interpreted import on_triton
from tests.learn.test_advantages import batch_of, loop_advantages

if find_spec("triton") is None:
    pytest.skip(
        "the package triton is not installed (pyproject asks for it on Linux)",
        allow_module_level=True,
    )

slow = pytest.mark.slow
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SMALL = (16, 32, 16, 16, 2, 1, 1)  # Tiles with which a few rows make many programs


def inputs(N, D, V, dtype, device="cpu", peak=3.0):
    """hidden, weight, targets; logits of spread `peak`."""
    generator = torch.Generator().manual_seed(N + V)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (N, V))
    hidden, weight = (
        x.to(device, dtype).requires_grad_() for x in (hidden * peak * D**-0.5, weight)
    )
    return hidden, weight, torch.randint(V, (N,), generator=generator).to(device)


def compare(case, used, temperature=0.7):
    """Outputs and gradients of the kernels against the reference in float64, and the outputs
    against the reference in their own type.
    """
    hidden, weight, targets = case
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(hidden), generator=generator).to(hidden.device) for _ in used]
    found = []
    for leaves, backend in (((hidden, weight), "triton"), (exact, "reference")):
        outputs = linear_logprobs(*leaves, targets, temperature, backend=backend)
        loss = sum(
            (u.to(outputs[i].dtype) * outputs[i]).sum() for i, u in zip(used, upstream, strict=True)
        )
        found.append((outputs, torch.autograd.grad(loss, leaves)))
    (outputs, gradients), (wanted, exact_gradients) = found
    plain = linear_logprobs(hidden, weight, targets, temperature, backend="reference")
    for got, same, want in zip(outputs, plain, wanted, strict=True):
        assert got.dtype == F32
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    for got, want, leaf in zip(gradients, exact_gradients, (hidden, weight), strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        limit = 1e-5 if leaf.dtype == F32 else 4e-3  # rounding to bfloat16 alone is 2e-3
        assert (got.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("N,V", [(0, 7), (1, 7), (63, 1000), pytest.param(100, 50_257, marks=slow)])
@on_triton
def test_linear_logprobs(device, N, V, dtype):
    compare(inputs(N, 24, V, dtype, device), (0, 1, 2))


@slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@on_triton
def test_the_largest_vocabulary(device, dtype):
    compare(inputs(4, 16, 151_936, dtype, device), (0, 1))


@pytest.mark.parametrize("used", [*(pytest.param((i,), marks=slow) for i in range(3)), (0, 1, 2)])
@on_triton
def test_many_tiles_spans_and_blocks(device, used):
    """No size is a multiple of a tile, no tensor is as large as the logits, and an output that is
    not used changes nothing.
    """
    from mar_kernels import triton_logprobs as kernels

    N, D, V = 37, 21, 150

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [
                x
                for x in (out if isinstance(out, tuple | list) else [out])
                if isinstance(x, torch.Tensor)
            ]
            self.nbytes = max(self.nbytes, *(x.nbytes for x in tensors), 0)
            return out

    hidden, weight, targets = case = inputs(N, D, V, F32, device)
    with patch.multiple(kernels, INTERPRETER=kernels.Tiles(*SMALL), BLOCK_ELEMENTS=N * 64):
        compare(case, used)
        with Largest() as largest:
            outputs = linear_logprobs(hidden, weight, targets, backend="triton")
            torch.autograd.grad([outputs[i].sum() for i in used], (hidden, weight))
    assert largest.nbytes == weight.nbytes < 4 * N * V


@pytest.mark.parametrize("frozen", [0, 1])
@on_triton
def test_a_gradient_that_nobody_wants_is_not_computed(device, frozen):
    from mar_kernels import triton_logprobs as kernels

    *leaves, targets = inputs(5, 24, 40, F32, device)
    outputs = linear_logprobs(*leaves, targets, backend="triton")
    both = torch.autograd.grad(outputs, leaves, [torch.ones(5, device=device)] * 3)
    leaves[frozen] = leaves[frozen].detach()
    with patch.object(kernels, "_mm", side_effect=kernels._mm) as product:
        outputs = linear_logprobs(*leaves, targets, backend="triton")
        loss = sum(
            x.sum() for x in outputs
        )  # its gradient is one number, expanded without memory of its own
        (one,) = torch.autograd.grad(loss, leaves[1 - frozen])
    assert product.call_count == 1 and torch.equal(one, both[1 - frozen])


@on_triton
def test_a_gradient_of_the_log_sum_exp_alone_may_be_strided(device):
    """`lse.sum()` sends one number, expanded without memory of its own; a kernel that reads past it
    finds something else.
    """
    hidden, weight, targets = inputs(5, 24, 40, F32, device)
    found = []
    for backend in ("triton", "reference"):
        lse = linear_logprobs(hidden, weight, targets, 0.7, backend=backend)[2]
        found += torch.autograd.grad(lse.sum(), (hidden, weight), retain_graph=True)
        found += torch.autograd.grad(lse, (hidden, weight), torch.arange(10.0, device=device)[::2])
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@on_triton
def test_logits_of_ten_thousand(device, dtype):
    hidden, weight, targets = inputs(6, 24, 50, dtype, device, peak=5e3)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    got = linear_logprobs(hidden, weight, targets, backend="triton")
    assert exact[2].max() > 1e4
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0.02)
    gradients = torch.autograd.grad(got[0].sum() + got[1].sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("tiles", ["one", "many"])
@on_triton
def test_a_token_of_probability_zero(device, tiles):
    """Its logit is -inf in every row: everything is as if it were not there, and it gets no
    gradient. Also with a whole tile and span of them.
    """
    from mar_kernels import triton_logprobs as kernels

    hidden, weight, targets = inputs(5, 24, 70, F32, device)
    hidden, gone = hidden.detach().abs(), torch.arange(70, device=device) < 34
    weight = weight.detach().masked_fill(gone[:, None], -torch.inf).requires_grad_()
    targets = targets.clamp(min=40)
    part = weight.detach()[~gone].requires_grad_()
    wanted = linear_logprobs(hidden, part, targets - 34, 0.8, backend="reference")
    chosen = kernels.INTERPRETER if tiles == "one" else kernels.Tiles(*SMALL)
    with patch.object(kernels, "INTERPRETER", chosen):
        got = linear_logprobs(hidden, weight, targets, 0.8, backend="triton")
        (gradient,) = torch.autograd.grad(got[0].sum() + got[1].sum(), weight)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    (want,) = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), part)
    torch.testing.assert_close(gradient[~gone], want, rtol=1e-4, atol=1e-6)
    assert not gradient[gone].any()


@pytest.mark.parametrize("where", ["hidden", "weight", "upstream"])
@on_triton
def test_nan_stays_nan(device, where):
    """In its own row only, where it is a row's; a NaN that came out as a gradient of 0 would train
    on without a word.
    """
    for output in range(3):
        hidden, weight, targets = inputs(5, 24, 40, F32, device)
        upstream = torch.ones(5, device=device)
        {"hidden": hidden.detach(), "weight": weight.detach(), "upstream": upstream[:, None]}[
            where
        ][3, 0] = torch.nan
        got = linear_logprobs(hidden, weight, targets, 0.7, backend="triton")[output]
        assert where == "upstream" or got[3].isnan()
        gradients = torch.autograd.grad(got, (hidden, weight), upstream)
        assert gradients[0][3].isnan().all() and gradients[1].isnan().all()
        if where != "weight":
            assert not got[:3].isnan().any() and not gradients[0][:3].isnan().any()


def far_apart(values, device):
    """The same matrix with its rows so far apart that the third lies past 2^31 elements. Only the
    pages of the rows are ever touched.
    """
    step = (1 << 30) + 8
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2 * step + values.shape[1], dtype=values.dtype, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return storage.as_strided(values.shape, (step, 1)).copy_(values)


@on_triton
def test_rows_past_two_to_the_31(device):
    from mar_kernels import triton_logprobs as kernels

    hidden, weight, targets = (x.detach() for x in inputs(3, 24, 3, BF16, device))
    near = linear_logprobs(hidden, weight, targets, backend="triton")
    for leaves in ((far_apart(hidden, device), weight), (hidden, far_apart(weight, device))):
        leaves = [x.requires_grad_() for x in leaves]
        for a, b in zip(linear_logprobs(*leaves, targets, backend="triton"), near, strict=True):
            assert torch.equal(a, b)
        got = torch.autograd.grad(
            linear_logprobs(*leaves, targets, backend="triton")[0].sum(), leaves
        )
        closer = [
            x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in leaves
        ]
        wanted = torch.autograd.grad(
            linear_logprobs(*closer, targets, backend="triton")[0].sum(), closer
        )
        assert all(map(torch.equal, got, wanted))

    block, wanted = (
        far_apart(torch.zeros(3, 3, dtype=BF16), device),
        torch.empty(3, 3, dtype=BF16, device=device),
    )
    _, entropy, lse = near
    ones, tiles = torch.ones(3, device=device), kernels.tiles_for(hidden, weight)
    for out in (block, wanted):  # the gradient of the logits is written there
        arguments = (
            hidden,
            weight,
            targets,
            lse,
            entropy,
            ones,
            ones,
            None,
            out,
            0,
            3,
            3,
            24,
            24,
            24,
            out.stride(0),
            1.0,
        )
        kernels.grads_kernel[1, 1](*arguments, **tiles.constants(tiles.grad_columns))
    assert wanted.all() and torch.equal(block, wanted)

    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    found = selected_logprobs(far_apart(logits, device), targets, backend="triton")
    assert torch.equal(found, selected_logprobs(logits, targets, backend="triton"))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("N,V", [(1, 7), (63, 1000), pytest.param(3, 151_936, marks=slow)])
@on_triton
def test_selected_logprobs(device, N, V, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (
        (3 * torch.randn(N, V + 1, generator=generator)).to(device, dtype)[:, :V].requires_grad_()
    )  # rows that do not touch
    targets, upstream = (
        torch.randint(V, (N,), generator=generator).to(device),
        torch.randn(N, generator=generator).to(device, dtype),
    )
    exact = logits.detach().double().requires_grad_()
    got, want = (
        selected_logprobs(logits, targets, backend="triton"),
        selected_logprobs(exact, targets),
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 4e-3, "atol": 1e-5}
    torch.testing.assert_close(got, want.to(dtype), **close)
    gradients = [
        torch.autograd.grad(o, x, upstream.to(o.dtype))[0]
        for o, x in ((got, logits), (want, exact))
    ]
    torch.testing.assert_close(gradients[0], gradients[1].to(dtype), **close)


@on_triton
def test_selected_logprobs_of_infinities_and_nan(device):
    logits = torch.tensor(
        [[-torch.inf, 1.0, 2.0], [1e4, -1e4, 0.0], [0.0, torch.nan, 1.0]], device=device
    ).requires_grad_()
    targets = torch.tensor([1, 0, 2], device=device)
    found = []
    for backend in ("triton", "reference"):
        out = selected_logprobs(logits, targets, backend=backend)
        found.append((out, *torch.autograd.grad(out.sum(), logits)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def advantages(device, arrays, choices, backend="triton", dtype=F64, tile_elements=8):
    from mar_kernels import triton_advantages as kernels

    tensors = [torch.from_numpy(a).to(device) for a in arrays]
    tensors[:2] = [x.to(dtype) for x in tensors[:2]]
    tensors[2] = tensors[2][:1].expand(len(tensors[2]), -1)  # as the batch has it: one row for all
    sizes = {"TILE_ELEMENTS": tile_elements, "TILE_ELEMENTS_OF_FLOAT64": tile_elements}
    with patch.multiple(kernels, **sizes):
        return answer_advantages(*tensors, **choices, backend=backend)


CHOICES = list(
    itertools.product(
        ["to_go", "set", "own"],
        ["leave_one_out", "mean", "none"],
        ["none", "group_std", "batch_std"],
    )
)
SOME = [CHOICES[i] for i in (0, 13, 26)]  # every value once


@pytest.mark.parametrize(
    "choices", [c if c in SOME else pytest.param(c, marks=slow) for c in CHOICES]
)
@on_triton
def test_advantages(device, choices):
    """Groups mixed, of one size and of one row; the tiles take two rows at a time."""
    names = dict(zip(("credit", "baseline", "scale"), choices, strict=True))
    for groups in ([1, 0, 2, 1, 0, 1], [0, 0, 0, 0], [0]):
        arrays = batch_of(len(groups), groups)
        got = advantages(device, arrays, names)
        np.testing.assert_allclose(got.cpu(), loop_advantages(*arrays, *choices), atol=1e-12)
    for dtype, limit in ((F64, 1e-12), (F32, 1e-5)):
        got, want = (
            advantages(device, arrays, names, backend, dtype, 1024)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    "credit", [pytest.param("to_go", marks=slow), pytest.param("set", marks=slow), "own"]
)
@on_triton
def test_advantages_of_empty_answers_and_masked_rows(device, credit):
    """Segments that decide nothing, segments after everything is decided, a row of nothing but
    padding, equal totals, NaN, no rows.
    """
    components, weights, _, segments, groups = batch_of(3, [0, 1, 0, 1])
    opens = np.tile([0, 0, 0, 3, 4, 4], (4, 1))
    segments[2] = 0
    broken = components.copy()
    broken[1, 2] = np.nan
    for scale in ("none", "group_std", "batch_std"):
        choices = {"credit": credit, "scale": scale}
        for rewards in (components, np.tile(components[:1], (4, 1)), broken):
            arrays = (rewards, weights, opens, segments, groups)
            got, want = (
                advantages(device, arrays, choices, backend) for backend in ("triton", "reference")
            )
            if (
                rewards is broken
            ):  # the reference lets NaN * 0 in sums over unordered ends; what matters is where it may not be
                assert got[1].isnan().any() and (
                    scale == "batch_std" or not got[[0, 2]].isnan().any()
                )
            else:
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    empty = [
        torch.from_numpy(x).to(device)
        for x in (components[:0], weights, opens[:0], segments[:0], groups[:0])
    ]
    assert answer_advantages(*empty, credit=credit, backend="triton").shape == (0, 7)


@pytest.mark.parametrize("choice", ["credit", "baseline", "scale"])
@on_triton
def test_unknown_choices_are_refused(device, choice):
    with pytest.raises(ValueError, match=f"unknown {choice} 'typo'"):
        answer_advantages(
            *(torch.from_numpy(a).to(device) for a in batch_of(0, [0, 0])),
            **{choice: "typo"},
            backend="triton",
        )


# --- which of them runs ---------------------------------------------------------------------------


def test_a_cpu_never_imports_triton():
    code = (
        "import sys, torch, mar_kernels as k; a = torch.ones(2, 3);"
        "k.linear_logprobs(a, a, torch.zeros(2, dtype=torch.int64)); print('triton' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.strip() == "False", ran.stderr


def on_a_gpu(dtype=F32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")


@pytest.mark.parametrize(
    "dtype,capability,expected",
    [
        (F32, (9, 0), "triton_logprobs"),
        (BF16, (8, 0), "triton_logprobs"),
        (F64, (9, 0), "reference"),
        (BF16, (7, 5), "reference"),
    ],
)
def test_auto_takes_triton_on_a_gpu_that_can(dtype, capability, expected):
    with patch.object(torch.cuda, "get_device_capability", lambda _: capability):
        module = mar_kernels._choose("triton_logprobs", "auto", on_a_gpu(dtype))
        assert module.__name__ == f"mar_kernels.{expected}"
        if expected == "reference":
            with pytest.raises(
                RuntimeError, match=r"backend=triton (takes tensors all of|needs an NVIDIA GPU)"
            ):
                mar_kernels._choose("triton_logprobs", "triton", on_a_gpu(dtype))
        assert mar_kernels._choose("triton_logprobs", "reference", on_a_gpu(dtype)) is reference


def test_triton_asked_for_and_missing_is_one_clear_sentence():
    a, targets = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"^backend=triton needs tensors on a GPU, or TRITON_INTERPRET=1 before"
    ):
        linear_logprobs(a, a, targets, backend="triton")
    with patch.object(mar_kernels, "find_spec", lambda _: None):
        with pytest.raises(
            RuntimeError, match="^backend=triton needs the package triton, which is not installed$"
        ):
            selected_logprobs(a, targets, backend="triton")
        assert mar_kernels._choose("triton_logprobs", "auto", on_a_gpu()) is reference
    with pytest.raises(
        ValueError, match="^unknown backend 'cuda'; known: auto, reference, triton$"
    ):
        linear_logprobs(a, a, targets, backend="cuda")


def test_costs_of_tokens_run_in_the_reference():
    """The kernel has none: asked for by itself it says so, and `auto` goes round it on a GPU."""
    tensors = [torch.from_numpy(array) for array in batch_of(0, [0, 0])]
    costs = torch.ones(tensors[3].shape, dtype=F64)
    kernels = import_module("mar_kernels.triton_advantages")
    with pytest.raises(ValueError, match="no token_costs: take backend=reference or auto"):
        kernels.answer_advantages(*tensors, token_costs=costs)
    rules = ("to_go", "leave_one_out", "none")
    mar_kernels._kernel_has.cache_clear()
    with patch.object(torch.cuda, "is_available", lambda: True):
        assert mar_kernels._kernel_has(*rules, False)
        with pytest.warns(
            UserWarning, match="costs of tokens: the advantages run in plain PyTorch"
        ):
            assert not mar_kernels._kernel_has(*rules, True)
    mar_kernels._kernel_has.cache_clear()


# --- what the compiler says -----------------------------------------------------------------------


def test_every_launch_is_compiled():
    import compile_report

    found = compile_report.launches(90)
    assert {launch.kernel.__name__ for launch in found} == {
        "sums_kernel",
        "grads_kernel",
        "advantages_kernel",
        "prompt_kernel",
        "own_kernel",
        "rotate_kernel",
    }
    assert len({launch.name for launch in found}) == len(found) == 36


@pytest.mark.parametrize(
    "change,problem",
    [
        ({}, None),
        ({"num_warps": 4}, r"a stack of \d+ bytes: registers were spilled"),
        pytest.param(
            {"UPCAST": True}, "multiplies without the tensor cores for its type", marks=slow
        ),
        pytest.param({"ROWS": 100}, "does not compile", marks=slow),
    ],
)
def test_a_bad_kernel_is_rejected(change, problem, monkeypatch, capsys):
    """Too few warps for the registers of a tile, a cast that loses the bf16 tensor cores, a size that
    triton has not.
    """
    import compile_report

    launch = next(
        x for x in compile_report.launches(90) if x.name == "grads bf16 of_target of_entropy"
    )
    for name, value in change.items():
        where = launch.options if name in launch.options else launch.arguments
        where[name] = value
    monkeypatch.setattr(
        compile_report, "launches", lambda capability: [launch] if capability == 90 else []
    )
    monkeypatch.setattr(sys, "argv", ["compile_report.py", "--check"])
    assert compile_report.main() == (problem is not None)
    printed = capsys.readouterr()
    assert (
        re.search(f"grads bf16 of_target of_entropy on sm_90: {problem}", printed.err)
        if problem
        else not printed.err
    )


def test_a_spill_that_ptxas_alone_reports_is_rejected(monkeypatch, capsys):
    import compile_report

    launch = next(
        x for x in compile_report.launches(90) if x.name == "grads bf16 of_target of_entropy"
    )
    found, count = [], compile_report.spilled_bytes

    def counted(ptx, capability):
        found.append(count(ptx, capability))
        return 16 if len(found) == 1 else found[-1]

    monkeypatch.setattr(compile_report, "spilled_bytes", counted)
    monkeypatch.setattr(
        compile_report, "launches", lambda capability: [launch] if capability == 90 else []
    )
    monkeypatch.setattr(sys, "argv", ["compile_report.py", "--check"])
    assert compile_report.main() == 1 and "ptxas -v: 16 bytes spilled" in capsys.readouterr().err
    launch.options["num_warps"] = 4
    assert compile_report.main() == 1
    if found == [None, None]:
        pytest.skip("the ptxas of this triton does not read its PTX")
    assert (
        found[0] == 0 < found[1]
        and f"ptxas -v: {found[1]} bytes spilled" in capsys.readouterr().err
    )


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    found = []
    for _ in range(2):
        hidden, weight, targets = inputs(300, 128, 50_257, BF16, "cuda")
        outputs = linear_logprobs(hidden, weight, targets, backend="triton")
        found.append(
            (*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (hidden, weight)))
        )
    assert all(map(torch.equal, *found))
