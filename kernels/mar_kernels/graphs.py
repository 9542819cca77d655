"""CUDA graphs: many small kernels started as one."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Graphs:
    """CUDA graphs that are replayed one at a time: all take their memory from one pool, and each
    writes over what another has left there.

    Where a capture fails, none is tried again.
    """

    pool: Any = None
    failed: bool = False

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """Run `work` and record its CUDA kernels; returns their replay on the same addresses.

        Where recording fails it warns and returns None. `work` has then run once, as it has
        otherwise. What it holds is not kept.

        Other threads may call CUDA meanwhile, as one that writes a checkpoint does: only calls of
        this thread can spoil the capture.
        """
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        replay: Callable[[], object] | None = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # the `with` goes back to the stream before, also from a capture that fails
        with torch.cuda.stream(stream):
            # libraries set themselves up in a first call, which no capture may hold
            work()
            try:
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    work()
                replay = graph.replay
            except RuntimeError as error:
                # CUDA's or torch's
                self.failed = True
                warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)
        torch.cuda.current_stream().wait_stream(stream)
        return replay
