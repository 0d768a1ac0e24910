"""What an error of a layer's experts does to the predictions: nats of KL for each unit of squared error.

In one layer at a time constants give the routed output, the coarsest of all answers, and the hidden states run on to
the logits. KL is nearly quadratic in small errors, so one number says what the squared errors of a layer cost. Errors
of that size, not smaller ones, because several layers err together in a compressed model: a quarter of them, as a
smaller step would measure it, foretold half of the KL that came of it.

Shapes: B sequences, L tokens, T = B x L, D model width, K experts of a token, E experts, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from moetailor.calibration.batch import spread
from moetailor.calibration.capture import replaced_forward
from moetailor.calibration.folder import Calibration, LayerEffect
from moetailor.calibration.layers import HiddenStates, LayerRunner, PartlyLoaded
from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.errors import CalibrationError
from moetailor.progress import Progress

# Tokens that run.
TOKENS = 4096


def measure_effects(
    calibration: Calibration,
    source: PartlyLoaded,
    anatomy: Anatomy,
    *,
    states: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the effect of every MoE layer, write it into the folder, and return the calibration that holds it.

    The moved states of a layer run through all layers after it: with n MoE layers about n / 2 forward passes over a few
    tokens.

    Args:
        calibration: a finished calibration.
        source: the model that was calibrated.
        anatomy: its MoE layers.
        states: folder for hidden states between layers; None keeps them in memory.
        progress: called with (decoder layers done, decoder layers in all).

    Raises:
        CalibrationError: the logits are not finite.
    """
    batches = spread(calibration.batches(), TOKENS)
    runner = LayerRunner(source, batches)
    original, moved = _stream(states, "original"), {}
    original.write(0, runner.embed())
    squared: dict[int, list[torch.Tensor]] = {}
    for index in range(runner.count):
        with runner.layer(index) as layer:
            for stream in moved.values():
                stream.write(index + 1, runner.through(layer, index, stream.read(index, len(batches))))
            if index in anatomy.layers:
                moved[index] = _stream(states, f"moved-{index}")
                constants = _constants(calibration, index)
                with _shifted(source.model, anatomy.layers[index], constants) as squared[index]:
                    moved[index].write(index + 1, runner.through(layer, index, original.read(index, len(batches))))
            original.write(index + 1, runner.through(layer, index, original.read(index, len(batches))))
        for stream in (original, *moved.values()):
            stream.forget(index)
        if progress:
            progress(index + 1, runner.count)
    kl = _kl(runner, original, moved)
    counted = torch.cat([batch.counted.flatten() for batch in batches])
    layers: dict[int, LayerEffect] = {
        index: {"kl": max(kl[index], 0.0), "squared_error": float(torch.cat(squared[index])[counted].sum())}
        for index in moved
    }
    if states:
        shutil.rmtree(states, ignore_errors=True)
    for index in moved:
        if not math.isfinite(layers[index]["kl"] + layers[index]["squared_error"]):
            raise CalibrationError(
                f"layer {index}: what its errors cost is not finite, the logits overflow; calibrate in a wider --dtype"
            )
    return calibration.with_effect({"tokens": int(counted.sum()), "layers": layers})


def _stream(folder: Path | None, name: str) -> HiddenStates:
    return HiddenStates(folder / name if folder else None)


def _constants(calibration: Calibration, layer: int) -> torch.Tensor:
    """Return the constant that is nearest to each expert's gated output, float32 [E, D]."""
    sums = calibration.sums(layer)
    # c_e = sum g^2 y / sum g^2
    return (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()


@contextmanager
def _shifted(model: nn.Module, layer: MoELayer, constants_ED: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Let constants give the routed output of a layer while the context lasts; gives the list of each run's squared
    errors, [T].
    """
    experts, squared = model.get_submodule(layer.experts), []
    inner = experts.forward

    def run(hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        y_TD = inner(hidden_TD, index_TK, weight_TK)
        constants = constants_ED.to(y_TD.device)
        instead_TD = torch.einsum("tk,tkd->td", weight_TK.float(), constants[index_TK.long()])
        squared.append((instead_TD - y_TD.float()).square().sum(-1).cpu())
        return instead_TD.to(y_TD.dtype)

    with replaced_forward(experts, run):
        yield squared


def _kl(runner: LayerRunner, original: HiddenStates, moved: dict[int, HiddenStates]) -> dict[int, float]:
    """Return the sum over counted tokens of KL(original || moved) for each moved stream."""
    found = dict.fromkeys(moved, 0.0)
    count = len(runner.batches)
    reading = {index: stream.read(runner.count, count) for index, stream in moved.items()}
    with runner.head() as logits:
        for number, hidden in enumerate(original.read(runner.count, count)):
            counted = runner.batches[number].counted
            true = torch.log_softmax(logits(number, hidden).float(), -1)
            for index, states in reading.items():
                other = torch.log_softmax(logits(number, next(states)).float(), -1)
                # KL(p || q) = sum_v p (log p - log q)
                kl_BL = (true.exp() * (true - other)).sum(-1).cpu()
                found[index] += float(kl_BL[counted].sum(dtype=torch.float64))
    return found
