"""CUDA graphs: many small kernels started as one."""

import warnings
from collections.abc import Callable

import torch


def capture(work: Callable[[], object]) -> Callable[[], object]:
    """Run `work` and record its CUDA kernels; returns their replay on the same addresses.

    Where recording fails it warns and returns `work` itself.
    """
    graph = torch.cuda.CUDAGraph()
    replay = work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # the `with` goes back to the stream before, also from a capture that fails
    with torch.cuda.stream(stream):
        # libraries set themselves up in a first call, which no capture may hold
        work()
        try:
            with torch.cuda.graph(graph, stream=stream):
                work()
            replay = graph.replay
        except RuntimeError as error:
            # CUDA's or torch's
            warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)
    torch.cuda.current_stream().wait_stream(stream)
    return replay
