"""CUDA graphs: many small kernels started as one."""

import warnings
from collections.abc import Callable

import torch


def capture(work: Callable[[], object]) -> Callable[[], object]:
    """Run `work` and record its CUDA kernels; returns their replay on the same addresses, or after a warning `work` itself where that fails."""
    stream, graph, replay = torch.cuda.Stream(), torch.cuda.CUDAGraph(), work
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        stream
    ):  # comes back to the stream before, also from a capture that fails
        work()  # libraries set themselves up, which no capture may hold
        try:
            with torch.cuda.graph(graph, stream=stream):
                work()
            replay = graph.replay
        except RuntimeError as error:  # CUDA's or torch's
            warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)
    torch.cuda.current_stream().wait_stream(stream)
    return replay
