"""Fitting front to back: each layer on the inputs that the compressed layers before it give.

Two streams of hidden states of the calibration text walk through the model together: one is that of the original model,
the other that of the compressed one. In a layer to which a plan adds tensors, the original stream shows what the
experts should give for each token; the compressed stream shows what the new tensors will get and how the router will
weigh them. Then the layer is changed, and the compressed stream runs through the changed layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from moetailor.calibration.capture import Pairs, Routed, captured
from moetailor.calibration.collector import Collector
from moetailor.calibration.folder import Calibration
from moetailor.calibration.layers import PartlyLoaded
from moetailor.calibration.sampling import Sampled, SampleOptions, sampled_positions
from moetailor.calibration.states import HiddenStates
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.run import view_of
from moetailor.planning.plan import Plan
from moetailor.planning.view import LayerView
from moetailor.transform.build import LayerTensors, change_layer, compute_layer


def propagated(
    plan: Plan, calibration: Calibration, source: PartlyLoaded, anatomy: Anatomy, states: Path | None = None
) -> Iterator[tuple[int, LayerTensors]]:
    """Change the layers of a model front to back; yield the number and tensors of those that have computed ones.

    Args:
        plan: what becomes of the slots.
        calibration: the calibration of the plan, whose text is run again.
        source: the original model, whose layers are changed in place.
        anatomy: its MoE layers.
        states: folder for hidden states between layers; None keeps them in memory.
    """
    walk = Walk(source, calibration.batches(), folder=states)
    sampled = sampled_positions(walk.batches, SampleOptions(**calibration.fingerprint["sample"]))
    original = walk.begin()
    compressed = walk.fork(original, "compressed")
    for index in walk.layers(max(plan.by_layer, default=-1) + 1):
        tensors = None
        if index in plan.by_layer and plan.by_layer[index].computed:
            fit = _Fit(walk, compressed, anatomy, index, sampled)
            walk.advance(original, fit.run, fit.collector)
            tensors = compute_layer(plan, fit.view(calibration))
        else:
            walk.advance(original)
        if index in plan.by_layer:
            change_layer(source.model, anatomy, plan, index, tensors)
        if tensors is not None:
            yield index, tensors
        walk.advance(compressed)


class _Fit:
    """Measures one layer on both streams.

    Args:
        walk: stands at the layer.
        compressed: the compressed stream.
        anatomy: the MoE layers.
        index: which layer.
        sampled: which tokens the method sees whole.
    """

    def __init__(
        self,
        walk: Walk,
        compressed: HiddenStates,
        anatomy: Anatomy,
        index: int,
        sampled: Sampled,
    ) -> None:
        self.walk, self.compressed, self.index, self.sampled = walk, compressed, index, sampled
        self.moe, self.weights = anatomy.layers[index], ExpertWeights(walk.model, anatomy=anatomy)
        self.collector = Collector(anatomy, index, walk.batches, sampled)
        self.originals: list[torch.Tensor] = []

    def run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Measure a batch on both streams, and return the original one's states behind the layer."""
        seen = _Inputs()
        with captured(self.walk.model, self.moe, seen):
            out = self.walk.run(number, hidden)
        self.originals.append(seen.hidden[self.sampled[number][1].to(seen.hidden.device)].cpu())
        self.collector.begin(number)
        # The router gets what the compressed layers give, the experts get what they got in the original.
        with captured(self.walk.model, self.moe, self.collector, instead=lambda: seen.hidden):
            self.walk.run(number, self.compressed[number])
        return out

    def view(self, calibration: Calibration) -> LayerView:
        """Return what the method's `build` sees: the statistics of this layer as they are in the compressed model."""
        measured = self.collector.finish()
        experts = Experts(self.walk.model.get_submodule(self.moe.experts))
        # The sample is sorted by key: the originals of its tokens follow it.
        order = torch.argsort(torch.cat([key for key, _ in self.sampled]), stable=True)
        return replace(
            view_of(calibration, self.index, self.weights),
            read_sums=lambda: measured.sums,
            read_sample=lambda: measured.sample,
            open_experts=lambda: nullcontext(experts),
            original=torch.cat(self.originals)[order],
            kept=None,
        )


class _Inputs:
    """Keeps the experts' inputs of the latest run, [T, D]."""

    hidden: torch.Tensor

    def tokens(self, run: Routed) -> None:
        """Keep the inputs of a run's tokens."""
        self.hidden = run.hidden

    def pairs(self, run: Pairs) -> None:
        """Keep nothing."""
