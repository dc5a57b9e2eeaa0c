"""Calls replayed from CUDA graphs, as an engine makes them: launches cost the host nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.suite import Peer, S
from tw_kernels.cuda_graphs import without_waits


def replayed(peer: Peer[S]) -> Peer[S]:
    """The peer with its calls on CUDA replayed from graphs, one for each set of inputs.

    A peer whose call cannot be captured is called as it is. The setup's `measured`, entries of a
    peer's row, gets `graph`: whether it was.
    """

    def prepare(setup: Any) -> Callable[[int], Any]:
        call = peer.prepare(setup)
        if setup.device != "cuda":
            return call
        try:
            replay = capture(call, setup.input_sets)
        except RuntimeError:  # it waits for the device, or does what else capturing forbids
            torch.cuda.synchronize()
            replay = None
        setup.measured.setdefault(peer.name, {})["graph"] = replay is not None
        return replay or call

    return Peer(peer.name, prepare, peer.ours, peer.why_absent)


def capture(call: Callable[[int], Any], input_sets: int) -> Callable[[int], Any]:
    """`call` as a replay; what it returns is overwritten by the next one on the same inputs.

    Raises:
        RuntimeError: it cannot be captured (WaitsForDevice: nothing was begun).
    """
    graphs, results = [], []
    for i in range(input_sets):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(i)  # compiles, loads kernels and allocates
            with without_waits():
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(call(i))
        graphs.append(graph)

    def replay(i: int) -> Any:
        graphs[i].replay()
        return results[i]

    return replay
