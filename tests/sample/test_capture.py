"""What a CUDA graph records must not wait for the device or read from the host.

No GPU is needed: the work runs on tensors without storage (the meta device), and each operator that
it calls is looked at. What needs a value cannot run there at all.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.gpu.count_operators import TRITON, in_triton
from mar.policy.model import Decoder
from mar.sample.draws import SamplingParams, Truncation
from mar.sample.engine import Engine, Request, decode_step

# They copy a value to the host, or make tensors whose size depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")


class IllegalCalls(TorchDispatchMode):
    """The operators called inside it that no graph may record."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if operator.overloadpacket.__name__ in WAITS:
            self.found.append(str(operator))
        # a number of Python is a tensor without dimensions, which the launch carries along
        if any(x.device.type == "cpu" and x.dim() > 0 for x in tensors):
            self.found.append(f"{operator} of a tensor on the host")
        return operator(*args, **(kwargs or {}))


def engine_on_meta(params: SamplingParams, make_model) -> Engine:
    """Two prompts with four rows each, as far as nothing has to be known of any value."""
    shape = make_model().config
    with torch.device("meta"):
        model = Decoder(shape)
    requests = [Request((1, 2, 3), (1, 2, 3, 4)), Request((1, 2), (5, 6, 7, 8))]
    return Engine(model, requests, params, kv_budget_tokens=1000, decode=str)


def calls_of_a_step(engine: Engine) -> IllegalCalls:
    with torch.no_grad(), IllegalCalls() as calls:
        decode_step(engine.model, engine.cache, engine.rows.last_tokens, width=4)
    return calls


def test_a_decode_step_can_be_captured(tiny_model):
    engine = engine_on_meta(SamplingParams(6), tiny_model)
    assert calls_of_a_step(engine).found == []


def test_a_decode_step_in_triton_can_be_captured(tiny_model):
    """What the kernels are called with stands on the device, or is a number known beforehand."""
    engine = engine_on_meta(SamplingParams(6), tiny_model)
    with in_triton() as (launches, arguments), engine.model.for_sampling("triton"):
        calls = calls_of_a_step(engine)
    assert calls.found == []
    assert launches == dict.fromkeys(TRITON, engine.model.config.num_layers)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}
    others = [x for x in arguments if not isinstance(x, torch.Tensor)]
    assert {type(x) for x in others} <= {int, float, bool}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(6),
        SamplingParams(6, 0.0, (3, 4)),
        SamplingParams(6, 0.7, (3,), Truncation(top_k=5, top_p=0.9, min_p=0.1)),
        SamplingParams(9, 1.0, (3,), think_budget=2, think_close=(5, 6)),
    ],
)
def test_a_draw_can_be_captured(tiny_model, params):
    engine = engine_on_meta(params, tiny_model)
    with torch.no_grad(), IllegalCalls() as calls:
        engine.draw_and_record()
    assert calls.found == []


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: torch.tensor([1.0, 2.0, 3.0]).to(x),
    ],
)
def test_what_no_graph_may_record_is_seen(work):
    x = torch.ones(3, device="meta")
    with IllegalCalls() as calls:
        try:
            work(x)
        except (RuntimeError, NotImplementedError) as error:
            calls.found.append(str(error))
    assert calls.found
