"""How sensitive the predictions are to errors of each layer's experts: nats of KL for each unit of squared error.

In one layer at a time each expert's output is replaced by a constant, the coarsest answer there is, and the hidden
states run on to the logits. KL is nearly quadratic in small errors, so KL divided by squared error is one number that
prices any error of that layer. The errors of constants are large on purpose: several layers err together in a
compressed model. Measured with errors of a quarter of that size, prices came out a third too low.

Shapes: B sequences, L tokens, T = B x L, D model width, K experts of a token, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from moetailor.calibration.batch import Batch, evenly_spaced_sequences
from moetailor.calibration.capture import replaced_forward
from moetailor.calibration.folder import Calibration, LayerSensitivity
from moetailor.calibration.layers import PartlyLoaded
from moetailor.calibration.states import HiddenStates
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.anatomy import Anatomy, MoELayer
from moetailor.errors import CalibrationError
from moetailor.progress import Progress

# Tokens that run.
TOKENS = 4096


def measure_sensitivities(
    calibration: Calibration,
    source: PartlyLoaded,
    anatomy: Anatomy,
    *,
    states: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure what errors of every MoE layer cost, write it into the folder, and return the calibration that holds it.

    Each MoE layer adds a stream, in which constants answered for that layer alone, and that runs through all layers
    after it: with n MoE layers about n / 2 forward passes over a few tokens.

    Args:
        calibration: a finished calibration.
        source: the model that was calibrated.
        anatomy: its MoE layers.
        states: where hidden states wait between layers; None keeps them in memory.
        progress: called with (batches done, batches in all) over all layers.

    Raises:
        CalibrationError: the logits are not finite.
    """
    batches = evenly_spaced_sequences(calibration.batches(), TOKENS)
    walk = Walk(source, batches, folder=states, progress=progress)
    original = walk.begin()
    replaced: dict[int, HiddenStates] = {}
    squared: dict[int, list[torch.Tensor]] = {}
    for index in walk.layers():
        for stream in replaced.values():
            walk.advance(stream)
        if index in anatomy.layers:
            replaced[index] = walk.fork(original, f"replaced-{index}")
            with _replaced(walk.model, anatomy.layers[index], _constants(calibration, index)) as squared[index]:
                walk.advance(replaced[index])
        walk.advance(original)
    kl = _kl(walk, original, replaced)
    walk.clear()
    counted = torch.cat([batch.counted.flatten() for batch in batches])
    layers: dict[int, LayerSensitivity] = {
        index: {"kl": max(kl[index], 0.0), "squared_error": float(torch.cat(squared[index])[counted].sum())}
        for index in replaced
    }
    for index, found in layers.items():
        if not math.isfinite(found["kl"] + found["squared_error"]):
            raise CalibrationError(
                f"layer {index}: what its errors cost is not finite, the logits overflow; calibrate in a wider --dtype"
            )
    return calibration.with_sensitivities({"tokens": int(counted.sum()), "layers": layers})


def _constants(calibration: Calibration, layer: int) -> torch.Tensor:
    """Return the constant that is nearest to each expert's gated output, float32 [E, D]."""
    sums = calibration.sums(layer)
    # c_e = sum g^2 y / sum g^2
    return (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()


@contextmanager
def _replaced(model: nn.Module, layer: MoELayer, constants_ED: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Replace what the experts of a layer give by constants while the context lasts.

    Yields:
        A list to which each run adds the squared errors of its tokens, [T].
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


def _kl(walk: Walk, original: HiddenStates, replaced: Mapping[int, HiddenStates]) -> dict[int, float]:
    """Return the sum over counted tokens of KL(original || replaced) for each stream."""
    found = dict.fromkeys(replaced, 0.0)

    def add(batch: Batch, logits: Callable[[HiddenStates], torch.Tensor]) -> None:
        true = torch.log_softmax(logits(original).float(), -1)
        for index, stream in replaced.items():
            other = torch.log_softmax(logits(stream).float(), -1)
            # KL(p || q) = sum_v p (log p - log q)
            kl_BL = (true.exp() * (true - other)).sum(-1).cpu()
            found[index] += float(kl_BL[batch.counted].sum(dtype=torch.float64))

    walk.predict(add)
    return found
