"""How sensitive the predictions are to errors of each layer's experts: nats of KL for each unit of squared error.

In one layer at a time each expert's output is replaced by a constant, the coarsest answer there is, and the hidden
states run on to the logits. KL is nearly quadratic in small errors, so KL divided by squared error is one number that
prices any error of that layer. The errors of constants are large on purpose: several layers err together in a
compressed model. Measured with errors of a quarter of that size, prices came out a third too low.

What rounding to few bits adds is another kind of error: noise, which has no direction of its own, and so small that
most of what it costs may come from tokens that later routers send elsewhere. It is measured apart and at two levels,
with all experts of the layer rounded to the nearest codes of about 6 and about 3 bits: as a mix of widths would do it,
more bits for experts whose errors weigh more. In the first layer of the reference model, noise of one size costs a
quarter more there than where all experts have as many bits. And since errors of several layers do not simply add up,
all three are measured once more in all layers together. `effects` makes prices of these numbers.

Shapes: B sequences, L tokens, T = B x L, D model width, K experts of a token, E experts, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from moetailor import ranks
from moetailor.calibration.batch import Batch, evenly_spaced_sequences
from moetailor.calibration.capture import captured, replaced_forward
from moetailor.calibration.effects import ERRORS, Effect, Effects, Errors, LayerEffects, Together
from moetailor.calibration.folder import Calibration
from moetailor.calibration.layers import Head, PartlyLoaded, by_rows, pieces
from moetailor.calibration.states import HiddenStates
from moetailor.calibration.statistics import Sums
from moetailor.calibration.stopped import Stopped
from moetailor.calibration.walk import Walk
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.storage import BITS, Integers
from moetailor.errors import CalibrationError
from moetailor.progress import Progress, resumed

# A stream: the layer in which experts are replaced, or all of them, and what they are replaced by.
Key = tuple[int, Errors]
ALL = -1
# Tokens that run.
TOKENS = 4096
GROUP = 128


def measure_sensitivities(
    calibration: Calibration,
    source: PartlyLoaded,
    anatomy: Anatomy,
    *,
    states: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure what errors of every MoE layer cost, write it into the folder, and return the calibration that holds it.

    Each MoE layer adds three streams, in which constants or rounded experts answered for that layer alone, and that run
    through all layers after it: with n MoE layers about 1.5 n forward passes over a few tokens. In three more these
    answered for all layers. Processes (`ranks`) share the streams out, and each runs the original's.

    Args:
        calibration: a finished calibration.
        source: the model that was calibrated.
        anatomy: its MoE layers.
        states: where hidden states wait between layers; None keeps them in memory.
        progress: called with (batches done, batches in all) over all layers, and behind them over predictions.

    Raises:
        CalibrationError: the logits are not finite.
    """
    batches = evenly_spaced_sequences(calibration.batches(), TOKENS)
    folder = None if states is None else states / str(ranks.number())

    def layers_done(done: int, total: int) -> None:
        if progress:  # predictions are still to come
            progress(done, total + len(batches))

    walk = Walk(source, batches, folder=folder, progress=layers_done)
    counted = torch.cat([batch.counted.flatten() for batch in batches])
    stopped = Stopped(folder, dict(calibration.hashes))
    original, streams = _run_streams(walk, calibration, anatomy, counted, stopped)
    own = {
        key: (kl, stopped.squared.get(_name(key), 0.0)) for key, kl in _kl(walk, original, streams, progress).items()
    }
    measured = {key: found for part in ranks.every(own) for key, found in part.items()}
    if states is not None:
        ranks.once(lambda: shutil.rmtree(states, ignore_errors=True))

    def effect(index: int, errors: Errors) -> Effect:
        kl, squared_error = measured[index, errors]
        if not math.isfinite(kl + squared_error + measured[ALL, errors][0]):
            told = "what its errors cost is not finite, the logits overflow; calibrate in a wider --dtype"
            raise CalibrationError(f"layer {index}: {told}")
        return {"kl": max(kl, 0.0), "squared_error": squared_error}

    layers: dict[int, LayerEffects] = {
        index: {
            "constants": effect(index, "constants"),
            "bits6": effect(index, "bits6"),
            "bits3": effect(index, "bits3"),
        }
        for index in anatomy.layers
    }
    nats = {errors: max(measured[ALL, errors][0], 0.0) for errors in ERRORS}
    every: Together = {"constants": nats["constants"], "bits6": nats["bits6"], "bits3": nats["bits3"]}
    found: Effects = {"tokens": int(counted.sum()), "layers": layers, "together": every}
    return ranks.once(lambda: calibration.with_sensitivities(found))


def _run_streams(
    walk: Walk, calibration: Calibration, anatomy: Anatomy, counted: torch.Tensor, stopped: Stopped
) -> tuple[HiddenStates, dict[Key, HiddenStates]]:
    """Run this process's streams through all layers, from where a run stood that was stopped.

    Args:
        walk: the way through the model.
        calibration: the calibration.
        anatomy: the MoE layers.
        counted: which tokens of the text count, [T].
        stopped: where that run stood; it is told of every layer that is done, and of the squared error in it.

    Returns:
        The original's stream, and those with errors, each of one layer or of all.
    """
    every: list[Key] = [(index, errors) for index in (ALL, *anatomy.layers) for errors in ERRORS]
    own = {key for number, key in enumerate(every) if ranks.mine(number)}
    original = walk.begin(stopped.layer)
    resumed(original.layer, walk.count, "layers of the sensitivities")
    streams = {
        key: walk.again(original, _name(key)) if original.layer else walk.fork(original, _name(key))
        for key in every
        if key in own and key[0] < original.layer
    }
    for index in walk.layers():
        moe = anatomy.layers.get(index)
        if moe is None:
            for stream in (*streams.values(), original):
                walk.advance(stream)
            stopped.note(index + 1)
            continue
        # In portions of the routed pairs: what they take does not grow with the sequences.
        with captured(walk.model, moe, None):
            for (at, _), stream in streams.items():
                if at != ALL:
                    walk.advance(stream)
            streams |= {key: walk.fork(original, _name(key)) for key in every if key in own and key[0] == index}
            module = walk.model.get_submodule(moe.experts)
            _run_with_errors(walk, index, module, calibration.sums(index), original, streams, counted, stopped)
        stopped.note(index + 1)
    return original, streams


def _run_with_errors(
    walk: Walk,
    index: int,
    module: Any,
    sums: Sums,
    original: HiddenStates,
    streams: Mapping[Key, HiddenStates],
    counted: torch.Tensor,
    stopped: Stopped,
) -> None:
    """Run the original's stream through a layer, and with errors those that get theirs there; see `_run_streams`."""
    with _outputs(module) as right:
        walk.advance(original)
    for errors in ERRORS:
        alone, together = streams.get((index, errors)), streams.get((ALL, errors))
        if alone is None and together is None:
            continue
        with _constants(module, sums) if errors == "constants" else _rounded(module, _bits(sums, int(errors[-1]))):
            if alone is not None:
                with _outputs(module) as wrong:
                    walk.advance(alone)
                squared_T = (torch.cat(wrong).float() - torch.cat(right).float()).square().sum(-1)
                stopped.squared[_name((index, errors))] = float(squared_T.cpu()[counted].sum())
            if together is not None:
                walk.advance(together)


def _name(key: Key) -> str:
    """Return what a stream is called on disk."""
    return f"{key[1]}-{'together' if key[0] == ALL else key[0]}"


@contextmanager
def _outputs(module: Any) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which the experts of a layer add what they give for each batch, [T, D]."""
    inner, found = module.forward, []

    def run(*given: torch.Tensor) -> torch.Tensor:
        found.append(inner(*given))
        return found[-1]

    with replaced_forward(module, run):
        yield found


def _constants(module: Any, sums: Sums) -> AbstractContextManager[None]:
    """Let each expert give the constant that is nearest to its gated output while the context lasts."""
    # c_e = sum g^2 y / sum g^2
    constants_ED = (sums.gate_sq_output / sums.gate_sq[:, None].clamp_min(1e-300)).float()

    def give(hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        constants = constants_ED.to(hidden_TD.device)
        return torch.einsum("tk,tkd->td", weight_TK.float(), constants[index_TK.long()]).to(hidden_TD.dtype)

    return replaced_forward(module, give)


def _bits(sums: Sums, mean: int) -> torch.Tensor:
    """Return bits of each expert with which all of them err about alike, [E].

    Args:
        sums: the layer's.
        mean: of the bits, where none is cut off.
    """
    energy = sums.gate_sq_norm_sq
    # b_e with sum g^2 |y_e|^2 4^-b_e the same for all
    level = energy.clamp_min(1e-4 * float(energy.max())).clamp_min(1e-300).log2() / 2
    return (mean + level - level.mean()).round().int().clamp(BITS[0], BITS[-1])


@contextmanager
def _rounded(module: Any, bits: torch.Tensor) -> Iterator[None]:
    """Keep the matrices of each expert of a layer rounded to its bits while the context lasts.

    Raises:
        CalibrationError: the weights are not in memory.
    """
    experts = Experts(module)
    rows = {name: parameter.detach() for name, parameter in experts.rows(slice(None)).items()}
    if any(each.is_meta for each in rows.values()):
        raise CalibrationError("sensitivities need weights in memory; calibrate with --stream in place of --device-map")
    kept = {name: _kept(each) for name, each in rows.items()}
    try:
        for stack in (experts.matrices()[name] for name in experts.shape.matrices):
            for own, each in zip(stack.split(1), bits.tolist(), strict=True):
                storage = Integers(bits=each, group=GROUP, symmetric=False)
                own.copy_(storage.numbers(storage.nearest(own, own.dtype), own.shape[-1]))
        yield
    finally:
        for name, each in rows.items():
            each.copy_(kept[name])


def _kept(numbers: torch.Tensor) -> torch.Tensor:
    """Return a copy of stacked numbers, in bfloat16 where that holds them, as it does those that came from there."""
    short = numbers.to(torch.bfloat16, copy=True)
    same = all(each.equal(own.to(each.dtype)) for each, own in zip(numbers, short, strict=True))
    return short if same else numbers.clone()


def _kl(
    walk: Walk, original: HiddenStates, replaced: Mapping[Key, HiddenStates], progress: Progress | None
) -> dict[Key, float]:
    """Return the sum over counted tokens of KL(original || replaced) for each stream."""
    found, before = dict.fromkeys(replaced, 0.0), walk.count * len(walk.batches)

    vocab_size = walk.model.config.get_text_config().vocab_size

    def add(number: int, batch: Batch, head: Head) -> None:
        parts = pieces(batch.input_ids.shape[1], len(batch.input_ids), vocab_size)
        hidden = original[number]
        true = [torch.log_softmax(head(hidden[:, here]).float(), -1) for here in parts]
        for key, stream in replaced.items():
            hidden = stream[number]
            for here, p in zip(parts, true, strict=True):
                kl_BC = by_rows(_divergence, p, head(hidden[:, here]))["kl"].cpu()
                found[key] += float(kl_BC[batch.counted[:, here]].sum(dtype=torch.float64))
        if progress:
            progress(before + number + 1, before + len(walk.batches))

    walk.predict(add)
    return found


def _divergence(logp_RV: torch.Tensor, logits_RV: torch.Tensor) -> dict[str, torch.Tensor]:
    # KL(p || q) = sum_v p (log p - log q)
    return {"kl": (logp_RV.exp() * (logp_RV - logits_RV.log_softmax(-1))).sum(-1)}
