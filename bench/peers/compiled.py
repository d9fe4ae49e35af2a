"""torch.compile and CUDA graphs of the other peers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``torch.compile`` in one graph for fixed shapes.

    Args:
        function: what to compile.
        mode: None for the default; ``"max-autotune-no-cudagraphs"`` for max-autotune, whose CUDA graph the benchmarks
            capture themselves, as for every other contender.
    """
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def forget_compiled() -> None:
    """Drop what was compiled before a case: the limit on recompilations counts over all cases of a process."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The kernels of ``run`` captured into a CUDA graph once; the result replays it. Raises what capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
