"""How much work the algebra that methods share does for one expert: FLOPs counted off its equations.

Time is that of an expert with as many tokens as all have on average, n of them sampled; memory is that of the one with
the most. Shapes: D model width, F expert width, r rank,
O outputs and I inputs of a matrix, K codes of a table, V weights of a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import torch

from moetailor.answers import Width
from moetailor.checkpoint.devices import working_nbytes
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import Codebook, FewBits
from moetailor.fitting.gptq import BLOCK
from moetailor.fitting.held_out import EVERY, FOLDS
from moetailor.fitting.linear_maps import ENOUGH, SCARCE
from moetailor.fitting.noise import measured_by
from moetailor.fitting.reduced_rank import EXACT, ITERATIONS, OVERSAMPLING
from moetailor.fitting.tokens import joined
from moetailor.fitting.widths import computed_nbytes
from moetailor.planning.work import LayerSize, Work

# Operations of a group's search for scales, of one code, and of handing on one input, and how often numbers are gone
# over for each of them: counted off storage/ and gptq.py.
FITS, CODES, INPUTS = 20, 12, 2


def fitted_tokens(layer: LayerSize) -> list[float]:
    """Return the tokens that each expert is fitted to."""
    return joined(layer.each, layer.shape.width, layer.sampled)


def of_factor(size: int) -> Work:
    """Return the work of a Cholesky factor, n^3 / 3."""
    return Work(doubles=size**3 / 3, steps=3)


def of_eigenvectors(size: int) -> Work:
    """Return the work of the eigenvalues and eigenvectors of a symmetric matrix, about 9 n^3."""
    return Work(spectra=9 * size**3, steps=3)


def of_approximation(rows: int, columns: int) -> Work:
    """Return the work of all approximations of a matrix [O, I] on its inputs, see `whitened.approximate`."""
    if rows <= columns:  # W C W^T and U^T W: 2 O I^2 and 4 O^2 I
        return Work(doubles=2 * rows * columns**2 + 4 * rows**2 * columns, steps=10) + of_eigenvectors(rows)
    # W L, its gram matrix and (W L) V: 6 O I^2; V^T L^-1: I^3
    doubles = 6 * rows * columns**2 + columns**3
    return Work(doubles=doubles, steps=10) + of_factor(columns) + of_eigenvectors(columns)


def of_outputs(shape: ExpertShape, tokens: float) -> Work:
    """Return the work of running an expert, 2 n D F for each matrix."""
    weights = sum(rows * columns for rows, columns in shape.matrices.values())
    return Work(products=2 * tokens * weights, elements=4 * tokens * (shape.width + shape.intermediate), steps=12)


def of_moments(width: int, tokens: float) -> Work:
    """Return the work of sums over tokens, x x^T and x y^T: 2 n D^2 each."""
    return Work(products=4 * tokens * width**2, elements=8 * tokens * width, steps=10)


def of_regression(width: int, tokens: float, rank: int) -> Work:
    """Return the work of one reduced-rank regression, see `Regression.solve`.

    Args:
        width: D.
        tokens: that it is fitted to, n.
        rank: the highest, r.
    """
    rank = int(min(rank, tokens, width))
    # the moments in float32 and float64, their shifted copy and its factor
    found = of_moments(width, tokens) + Work(steps=30, nbytes=48 * width**2)
    found += of_factor(width) + Work(elements=6 * width**2, steps=10)

    def full(columns: int) -> Work:  # C^-1 M v: 2 D^2 v for each factor
        return Work(products=2 * width**2 * columns, doubles=2 * width**2 * columns, steps=6)

    def operator(columns: int) -> Work:  # M^T C^-1 M v
        return full(columns) + Work(products=2 * width**2 * columns, steps=2)

    if not rank:
        return found
    wide = rank + OVERSAMPLING
    if width <= EXACT or 2 * wide >= width:
        return found + operator(width) + of_eigenvectors(width) + full(rank)
    # QR of D x v: 4 D v^2 with its Q
    turned = ITERATIONS * Work(spectra=4 * width * wide**2, steps=4)
    return found + (ITERATIONS + 1) * operator(wide) + turned + of_eigenvectors(wide) + full(rank)


def of_held_out_maps(layer: LayerSize, rank: int) -> Work:
    """Return the work of pricing an expert's linear maps, see `linear_maps.held_out_errors`.

    Args:
        layer: the layer.
        rank: the highest rank that is priced.
    """
    width, tokens, every = layer.shape.width, layer.tokens, fitted_tokens(layer)
    few = tokens < min(SCARCE * width, ENOUGH)
    times, fitted = (FOLDS, tokens * (1 - 1 / FOLDS)) if few else (1, tokens * (1 - 1 / EVERY))
    judged = Work(products=4 * (tokens - fitted) * width * rank, elements=16 * tokens * width, steps=30)
    others = of_moments(width, fmean(every) - tokens)
    # inputs and outputs, those that are fitted once more, and centred; moments of both
    held = Work(nbytes=int(26 * max(every) * width + 8 * width**2))
    once = of_regression(width, fitted, rank) + judged
    return of_outputs(layer.shape, fmean(every)) + others + held + times * once


def of_map(layer: LayerSize, rank: int) -> Work:
    """Return the work of fitting an expert's map of a rank, and of saying what it loses."""
    width, tokens, every = layer.shape.width, layer.tokens, fitted_tokens(layer)
    judged = Work(products=4 * tokens * width * rank, elements=8 * tokens * width, steps=20)
    # inputs and outputs, then centred or, to be judged, what is left of them in float64; moments of both
    held = Work(nbytes=int(20 * max(every) * width + 8 * width**2))
    return of_outputs(layer.shape, fmean(every)) + of_regression(width, fmean(every), rank) + judged + held


def of_gptq(outputs: int, inputs: int, storage: FewBits, together: int) -> Work:
    """Return the work of rounding a matrix by GPTQ.

    Args:
        outputs: O.
        inputs: I.
        storage: how the codes lie.
        together: matrices that are rounded at once, which share the operations.
    """
    size, weights = storage.size(inputs), outputs * inputs
    # Errors go to the later inputs of all groups, O I^2, to those of the group, O I S, and to those of the block.
    products, passes, steps = weights * (inputs + size), float(BLOCK), inputs * INPUTS
    if isinstance(storage, Codebook):
        # All K rows are tried for a code, when its scale is fitted and when it is chosen: 2 (V + 2) K, and 3 looks.
        tried = 2 * 2**storage.code_bits / storage.step
        products, passes = products + weights * tried * 2 * (storage.step + 2), passes + tried + 12
        steps += inputs / storage.step * CODES
    else:
        passes, fits = passes + 6 * storage.tries + 8, storage.groups(inputs) * storage.tries * FITS
        steps += inputs * CODES / 2 + fits
    return Work(products=products, elements=passes * weights, steps=(steps + 20 * storage.groups(inputs)) / together)


def of_rounded(layer: LayerSize, halves: Iterable[tuple[FewBits, Sequence[FewBits]]], tokens: float) -> Work:
    """Return the work of rounding an expert, see `widths.Together`.

    Args:
        layer: the layer.
        halves: storages of gate and up projections, with those that the down projection then has.
        tokens: that say what the expert gets.
    """
    shape, together = layer.shape, batch_of(layer)
    width, inner, inputs = shape.width, shape.intermediate, len(shape.inputs)

    def seen(size: int) -> Work:  # a factor, an inverse and its factor, in float32
        return Work(doubles=0.5 * 4 / 3 * size**3, steps=10)

    hidden = Work(products=2 * tokens * inputs * width * inner, elements=4 * tokens * inner, steps=8)
    found = Work(products=2 * tokens * width**2, elements=2 * tokens * width, steps=4)
    found += hidden + seen(width)
    for gate, downs in halves:
        found += hidden + of_gptq(inputs * inner, width, gate, together) + seen(inner)
        # moments of what the down projection gets, and W (C_hh' + l I) (C_h'h' + l I)^-1
        found += Work(products=4 * tokens * inner**2 + 2 * width * inner**2, elements=4 * tokens * inner, steps=20)
        found += Work(doubles=0.5 * (inner**3 / 3 + 2 * width * inner**2), steps=4)
        for down in downs:
            found += of_gptq(width, inner, down, together)
    return found


def of_noise(layer: LayerSize, widths: Sequence[Width]) -> Work:
    """Return the work of pricing an expert in some widths, see `noise.held_out_errors`."""
    halves: dict[FewBits, dict[FewBits, None]] = {}
    for storages in (width.storages(layer.shape) for width in widths):
        gate, down = (measured_by(storages[name]) for name in ("up", "down"))
        halves.setdefault(gate, {})
        halves.setdefault(gate if type(storages["up"]) is type(storages["down"]) else down, {})[down] = None
    every = fmean(fitted_tokens(layer))
    judged = every / EVERY
    tokens = every - judged
    each = Work(products=2 * judged * layer.weights, elements=4 * judged * layer.shape.width, steps=30)
    times = len(halves) + sum(map(len, halves.values()))
    return (
        of_outputs(layer.shape, every)
        + of_rounded(layer, [(gate, list(downs)) for gate, downs in halves.items()], tokens)
        + times * each
        + Work(nbytes=rounded_nbytes(layer))
    )


def of_width(layer: LayerSize, width: Width) -> Work:
    """Return the work of rounding an expert to a width by GPTQ, see `widths.quantized`."""
    storages, tokens = width.storages(layer.shape), fmean(fitted_tokens(layer))
    if not storages:
        return Work()
    found = of_rounded(layer, [(storages["up"], [storages["down"]])], tokens)
    return found + Work(nbytes=rounded_nbytes(layer, compared=False))


def batch_of(layer: LayerSize) -> int:
    """Return how many experts are rounded together, as `widths.at_once` has it."""
    nbytes = computed_nbytes(layer.shape, fmean(fitted_tokens(layer)))
    return max(1, min(working_nbytes(torch.zeros(0).device) // nbytes, layer.experts))


def rounded_nbytes(layer: LayerSize, *, compared: bool = True) -> int:
    """Return the bytes that rounding takes of as many experts as are rounded together, those with the most tokens; see
    `computed_nbytes`.
    """
    count, every = batch_of(layer), sorted(fitted_tokens(layer))
    # each runs alone: what gate and up give, their product, and one more
    run = int(16 * every[-1] * layer.shape.intermediate)
    return count * computed_nbytes(layer.shape, fmean(every[-count:]), compared=compared) + run


def of_refitted(layer: LayerSize, kept: int, neurons: int, rounds: int) -> Work:
    """Return the work of fitting the down projections of experts that stay to what all gave, see `refitted.fitted`.

    Args:
        layer: the layer.
        kept: experts that stay.
        neurons: of each that stay, n.
        rounds: how often each is fitted.
    """
    width, inner, tokens = layer.shape.width, layer.shape.intermediate, layer.sampled * layer.top_k / kept
    found = layer.experts * of_outputs(layer.shape, layer.tokens) + kept * of_outputs(layer.shape, tokens)
    # what is missing, and of one expert what it is applied to and what it should give, some times; whoever had most
    # tokens gets as many more as the others
    most = min(tokens + max(layer.each) - layer.tokens, layer.sampled)
    found += Work(nbytes=int(12 * (layer.sampled * width + most * (inner + width))))
    # gate and up; what it gave, p p^T and y p^T, and what it gives then
    products = tokens * (2 * len(layer.shape.inputs) * width * inner + 6 * width * neurons + 2 * neurons**2)
    each = Work(products=products, elements=tokens * (8 * inner + 8 * width), steps=60)
    # A, C, W0 G twice, A^T A and the solution; V^T H V, and the factor of the strength that is chosen
    each += Work(doubles=16 * width * neurons**2 + 4 * neurons**3, elements=8 * width * neurons)
    each += of_eigenvectors(neurons) + of_factor(neurons)
    # h h^T and its inverse, and for every neuron that goes the rest of both: 2 F^2 + 2 D F numbers, some times
    gone = inner - neurons
    cut = Work(products=2 * tokens * inner**2, doubles=2 * inner**3, elements=3 * gone * inner * (inner + width))
    return found + kept * rounds * each + (kept * cut if gone else Work())


def of_low_rank(layer: LayerSize, ranks: Sequence[int]) -> Work:
    """Return the work of pricing an expert's low-rank parts over a base, see `mix_plain`: its matrices are approximated
    on what some tokens give them, and it runs on the others for each rank.

    Args:
        layer: the layer.
        ranks: those that are priced.
    """
    shape, tokens = layer.shape, layer.tokens
    few = tokens < min(SCARCE * shape.width, ENOUGH)
    times, held = (FOLDS, tokens / FOLDS) if few else (1, tokens / EVERY)
    fitted = tokens - held
    # outputs of all; what the down projection gets of some, and the moments of both kinds of inputs
    seen = 2 * fitted * (len(shape.inputs) * shape.width * shape.intermediate + shape.width**2 + shape.intermediate**2)
    found = of_outputs(shape, tokens) + Work(products=seen, elements=6 * fitted * shape.width, steps=30)
    for rows, columns in shape.matrices.values():
        found += of_approximation(rows, columns)
        found += Work(doubles=2 * sum(ranks) * rows * columns, elements=4 * len(ranks) * rows * columns, steps=40)
    # what an expert is given and gives, what it works out between, and factors of its matrices
    most = max(layer.each)
    held_nbytes = int(12 * most * shape.width + 16 * most * shape.intermediate + 48 * shape.width**2)
    return times * (found + len(ranks) * of_outputs(shape, held)) + Work(nbytes=held_nbytes)
