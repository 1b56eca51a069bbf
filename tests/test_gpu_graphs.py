"""Steps in CUDA graphs: replays equal steps outside of graphs, bit for bit, however many there are."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    BF16_TRAINING,
    SAMPLED,
    WAYS,
    assert_same_results,
    captured,
    gradients,
    moved,
    optimizer_of,
    parameters,
    passes_of,
    paused_streams,
    step,
)
from support import BF16, FLOAT
from torch import Tensor

pytestmark = pytest.mark.gpu


class Twins:
    """An optimizer to capture and one to step without a graph, from the same start, whose gradients,
    learning rates and loss scales are in the same place for every step."""

    def __init__(self, on_device: torch.Generator, way: str, dtype=FLOAT, scaled=False, made=False):
        self.on_device, self.scaled, self.made = on_device, scaled, made
        options = {**WAYS[way], **(BF16_TRAINING if dtype == BF16 else {})}
        self.start = parameters(on_device, dtype, SAMPLED)
        self.lr = torch.tensor(1e-2, device="cuda")
        self.scale = torch.tensor(8.0, device="cuda")
        self.found_inf = torch.tensor(0.0, device="cuda")
        self.passes = [gradients(on_device, dtype, SAMPLED) for _ in range(passes_of(options))]
        self.captured, self.eager = (
            optimizer_of(self.start, options, lr=self.lr, capturable=True) for _ in range(2)
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(self.captured)
        torch.cuda.current_stream().wait_stream(side)
        self.run(self.eager)

    def run(self, optimizer) -> None:
        """``made``: with gradients that are made in the step, in the graph's own memory."""
        if self.scaled:  # as GradScaler hands them over
            optimizer.grad_scale, optimizer.found_inf = self.scale, self.found_inf
        passes = [[g * 2 for g in grads] for grads in self.passes] if self.made else self.passes
        step(optimizer, passes, self.scale if self.scaled else None)

    def renew(self, i: int) -> None:
        """Other gradients, another learning rate and scale; the third step is one to skip."""
        for grads in self.passes:
            for g in grads:
                g.normal_(generator=self.on_device)
        self.lr.fill_(1e-2 / (i + 1))
        self.scale.fill_(2.0**i)
        self.found_inf.fill_(float(i == 2))

    def replay(self, graph: torch.cuda.CUDAGraph, i: int) -> None:
        self.renew(i)
        graph.replay()
        self.run(self.eager)

    def check(self) -> None:
        assert_same_results(self.captured, self.eager)
        assert moved(self.start, self.captured)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("way", WAYS)
def test_replays_equal_steps(on_device, way, scaled):
    twins = Twins(on_device, way, scaled=scaled)
    graph = captured(lambda: twins.run(twins.captured))
    twins.check()  # a capture runs nothing
    for i in range(5):
        twins.replay(graph, i)
    twins.check()
    counts = [int(twins.captured.state[p]["step"]) for p in twins.captured.state]
    assert set(counts) == {5 if scaled else 6}


@pytest.mark.parametrize("way", ["bracket", "ensemble-exact"])
def test_replays_with_stochastic_rounding(on_device, way):
    """Keyed by the step on the device, so that every replay rounds in its own way."""
    twins = Twins(on_device, way, BF16, made=True)
    graph = captured(lambda: twins.run(twins.captured))
    for i in range(4):
        twins.replay(graph, i)
    twins.check()


def test_statistics_of_a_replay(on_device):
    """Are those of the latest replay, where the capture has put them."""
    twins = Twins(on_device, "clipping-ensemble")
    graph = captured(lambda: twins.run(twins.captured))
    for i in range(3):
        twins.replay(graph, i)
        assert torch.equal(twins.captured.grad_norm, twins.eager.grad_norm)
        actual = twins.captured.selection
        for kind, selection in twins.eager.selection.items():
            for a, e in zip(actual[kind], selection, strict=True):
                assert torch.equal(a, e), kind


@pytest.mark.parametrize(
    "way",
    ["bracket", "exact", "approx", "first", "ensemble-exact", "clipping-ensemble", "tensor-ensemble"],
)
def test_fifty_captures_in_one_process(on_device, generator, way):
    """One step outside of graphs is enough for any number. Each graph makes its gradients and masks in
    memory of its own, so it uploads tables of its own; steps between replays upload others."""
    twins = Twins(on_device, way, scaled=True, made=True)
    graphs = [captured(lambda: twins.run(twins.captured)) for _ in range(50)]
    for i, k in enumerate(torch.randperm(50, generator=generator).tolist()):
        twins.replay(graphs[k], i % 10)
    twins.check()


def test_captures_between_steps(on_device):
    """Graphs that are captured, replayed and thrown away by turns with steps without a graph."""
    twins = Twins(on_device, "ensemble", made=True)
    for i in range(20):
        graph = captured(lambda: twins.run(twins.captured))
        twins.replay(graph, i)
        torch.cuda.synchronize()
        del graph
        twins.renew(i)
        for optimizer in (twins.captured, twins.eager):
            twins.run(optimizer)
    twins.check()


def test_graphs_of_two_optimizers_at_once(on_device):
    """Replayed on two streams, queued up behind a pause."""
    pairs = [Twins(on_device, way, made=True) for way in ("bracket", "clipping-ensemble")]
    graphs = [captured(lambda twins=twins: twins.run(twins.captured)) for twins in pairs]
    streams = paused_streams(len(pairs))
    for _ in range(5):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for twins in pairs:
        for _ in range(5):
            twins.run(twins.eager)
        twins.check()


def test_what_a_graph_reads_is_kept(on_device):
    """However many tables other steps upload, and whoever gets memory that they no longer need."""
    twins, other = Twins(on_device, "ensemble"), Twins(on_device, "ensemble", made=True)
    graph = captured(lambda: twins.run(twins.captured))
    kept: list[Tensor] = []
    for i in range(50):  # gradients at other addresses, another learning rate
        other.eager.param_groups[0]["lr"] = 1e-3 / (i + 1)
        other.run(other.eager)
        kept += [p.grad for p in other.eager.param_groups[0]["params"]]
    kept += [torch.full((64 * (i % 32 + 1),), torch.nan, device="cuda") for i in range(1000)]
    for i in range(3):
        twins.replay(graph, i)
    assert len(kept) > 1000
    twins.check()
