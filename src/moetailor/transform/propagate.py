"""Fitting front to back: each layer on the inputs that the compressed layers before it give.

Two streams of hidden states go through the model together. In each layer that a plan adds tensors to, the original
stream gives what every token's experts should put out, the compressed stream gives what the new tensors will get in and
how the router will weigh it. The layer is then changed, and the compressed stream goes on through the changed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moetailor.calibration.batch import Batch
from moetailor.calibration.capture import Pairs, Routed, captured
from moetailor.calibration.folder import Calibration
from moetailor.calibration.layers import HiddenStates, LayerRunner, PartlyLoaded
from moetailor.calibration.run import Collector, SampleOptions, sampled_positions
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.methods.run import view_of
from moetailor.planning.plan import Plan
from moetailor.planning.view import LayerView
from moetailor.transform.build import LayerTensors, change_layer, compute_layer


def propagated(
    plan: Plan, calibration: Calibration, source: PartlyLoaded, anatomy: Anatomy, states: Path | None = None
) -> Iterator[tuple[int, LayerTensors]]:
    """Yield decoder layer and computed tensors of each layer that has any, front to back; the model changes too.

    Args:
        plan: what becomes of the slots.
        calibration: the calibration of the plan, whose text is run again.
        source: the original model; each layer is changed in place after it was fitted.
        anatomy: its MoE layers.
        states: folder for hidden states between layers; None keeps them in memory.
    """
    batches = calibration.batches()
    runner = LayerRunner(source, batches)
    original = HiddenStates(states / "original" if states else None)
    compressed = HiddenStates(states / "compressed" if states else None)
    original.write(0, runner.embed())
    compressed.write(0, original.read(0, len(batches)))
    sampled = sampled_positions(batches, SampleOptions(**calibration.fingerprint["sample"]))
    for index in range(max(plan.by_layer, default=-1) + 1):
        inputs = original.read(index, len(batches)), compressed.read(index, len(batches))
        with runner.layer(index) as layer:
            if index in plan.by_layer and plan.by_layer[index].computed:
                fit = _Fit(runner, layer, batches, anatomy, index, sampled)
                original.write(index + 1, fit.run(*inputs))
                tensors = compute_layer(plan, fit.view(calibration))
            else:
                original.write(index + 1, runner.through(layer, index, inputs[0]))
                tensors = None
            if index in plan.by_layer:
                change_layer(source.model, anatomy, plan, index, tensors)
                if tensors is not None:
                    yield index, tensors
            compressed.write(index + 1, runner.through(layer, index, compressed.read(index, len(batches))))
        original.forget(index)
        compressed.forget(index)


class _Fit:
    """Measures one layer on both streams."""

    def __init__(
        self,
        runner: LayerRunner,
        layer: nn.Module,
        batches: list[Batch],
        anatomy: Anatomy,
        index: int,
        sampled: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.runner, self.layer, self.index, self.sampled = runner, layer, index, sampled
        self.model, self.moe = runner.source.model, anatomy.layers[index]
        self.weights = ExpertWeights(self.model, anatomy=anatomy)
        self.collector = Collector(anatomy, index, batches, sampled)
        self.originals: list[torch.Tensor] = []

    def run(self, original: Iterator[torch.Tensor], compressed: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Measure, and yield the original stream's next hidden states."""
        seen = _Inputs()
        for number, (true, now) in enumerate(zip(original, compressed, strict=True)):
            with captured(self.model, self.moe, seen):
                out = self.runner.run(self.layer, self.index, number, true)
            self.originals.append(seen.hidden[self.sampled[number][1].to(seen.hidden.device)].cpu())
            self.collector.begin(number)
            # The router decides on what the compressed layers give; the experts show what they gave originally.
            with captured(self.model, self.moe, self.collector, instead=lambda: seen.hidden):
                self.runner.run(self.layer, self.index, number, now)
            yield out

    def view(self, calibration: Calibration) -> LayerView:
        """Return what the method's `build` sees."""
        measured = self.collector.finish()
        experts = self.model.get_submodule(self.moe.experts)
        # The sample is sorted by key: the originals of its tokens follow it.
        order = torch.argsort(torch.cat([key for key, _ in self.sampled]), stable=True)
        return replace(
            view_of(calibration, self.index, self.weights),
            read_sums=lambda: measured.sums,
            read_sample=lambda: measured.sample,
            open_experts=lambda: nullcontext(experts),
            original=torch.cat(self.originals)[order],
        )


class _Inputs:
    """Keeps the experts' inputs of the latest run."""

    hidden: torch.Tensor

    def tokens(self, run: Routed) -> None:
        """Take the tokens of a run."""
        self.hidden = run.hidden

    def pairs(self, run: Pairs) -> None:
        """Take nothing."""
