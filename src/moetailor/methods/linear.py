"""Linear stand-ins: a removed expert becomes an affine map of low rank of the layer's input.

Not from a paper; a twin that was found independently is published as arXiv:2610.41366, whose text was not at hand when
this was written. A novice (MoNE) is the map of rank 0. An expert e is replaced by S_e(x) = c_e + (x - m_e) A_e B_e with
A_e [D, r] and B_e [r, D], the best in the layer's own loss sum_t g_e(t)^2 |E_e(x_t) - S_e(x_t)|^2: weighted
reduced-rank regression on the sampled tokens that are routed to e. Stored are 2 r D + D numbers.

The experts that such a map replaces worst stay. With `ranks=chosen` each expert of a layer is kept or gets a rank of
its own, so that the error on held-out tokens is least at the bytes that the given rank would have taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from moetailor.answers import Answer, Constant, Keep, Linear
from moetailor.errors import MoetailorWarning, PlanError
from moetailor.fitting.held_out import choosing
from moetailor.fitting.menu import Menu, cheapest
from moetailor.fitting.reduced_rank import Regression, shared_inputs
from moetailor.methods.choose import refuse_protected, top
from moetailor.methods.mone import novices
from moetailor.methods.registry import AtLeast, method
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.plan import answers_nbytes
from moetailor.planning.view import LayerView

# With fewer tokens than so many times the width, an eighth of them is too few to choose by.
SCARCE = 8
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def outline(experts: int, keep: int, *, rank: int, shared: bool, **_: object) -> LayerPlan:
    """Return a plan of the bytes that `keep` experts and maps of the given rank take."""
    return keep_only(experts, range(keep), _stand_in(rank, shared))


def build(layer: LayerView, plan: LayerPlan, *, ridge: float, shrinkage: float, **_: object) -> dict[str, torch.Tensor]:
    """Return ``constant`` and ``linear_constant`` [n, D], ``linear_in`` and ``linear_out`` [rows, D] of a plan."""
    every = novices(layer, "optimal", shrinkage)
    maps = plan.of(Linear)
    found = {"constant": every[list(constants)]} if (constants := plan.of(Constant)) else {}
    if not maps:
        return found
    constant, common = every[list(maps)], None
    if any(map.shared for map in maps.values()):
        problems = (_regression(layer, slot) for slot in maps)
        rank = max(map.rank for map in maps.values())
        common = shared_inputs((one for one in problems if one), layer.shape.width, rank, ridge)
    inputs, outputs, scarce = [], [], []
    for at, (number, map) in enumerate(maps.items()):
        rank, problem = map.rank, _regression(layer, number)
        inner, outer, mean = _factors(problem, rank, ridge, common, layer)
        if problem is None or len(problem.x_TD) < rank:
            scarce.append(number)
        # like a novice's: pulled towards the layer's mean where few tokens say what the expert does
        count = float(layer.sums.count[number])
        outer = outer * (count / (count + shrinkage)) if shrinkage else outer
        # c - m A B: the constant takes what the map gives for the mean input
        constant[at] -= ((mean @ inner) @ outer).cpu()
        inputs.append(inner.T)
        outputs.append(outer)
    if scarce:
        warnings.warn(
            f"layer {layer.index}: {len(scarce)} linear stand-ins have fewer sampled tokens than their rank (expert "
            f"{scarce[0]} first) and are of a lower rank in truth; keep more with --sample-tokens",
            MoetailorWarning,
            stacklevel=2,
        )
    linear_in = common.T.cpu() if common is not None else torch.cat(inputs)
    return found | {"linear_constant": constant, "linear_in": linear_in, "linear_out": torch.cat(outputs)}


@method(
    "linear",
    removed=Linear,
    needs={"tokens", "count", "gate_sq", "gate_sq_output", "gate_sq_norm_sq"},
    weights=True,
    outline=outline,
    builds={"constant", "linear"},
    build=build,
)
def linear(
    layer: LayerView,
    keep: int,
    *,
    rank: Annotated[int, AtLeast(0)] = 8,
    ranks: Literal["given", "chosen"] = "given",
    ridge: Annotated[float, AtLeast(0)] = 0.01,
    shrinkage: Annotated[float, AtLeast(0)] = 0.0,
    shared: bool = False,
) -> LayerPlan:
    """Replace the experts that low-rank linear maps of the layer's input answer for best by such maps.

    Args:
        layer: the layer.
        keep: experts that stay.
        rank: rank of the maps; 0 is the optimal novice.
        ranks: ``given`` uses that rank everywhere; ``chosen`` keeps an expert or chooses its rank by the error on
            held-out tokens, in no more bytes than `keep` experts and maps of `rank` take.
        ridge: pull of the regression towards 0, as a share of the mean variance of the inputs.
        shrinkage: pulls each map towards the layer's mean output as if that many tokens had given it.
        shared: store one input factor for all maps of the layer.
    """
    del shrinkage
    nbytes = answers_nbytes([_stand_in(rank)], layer.shape, layer.dtype)
    if nbytes >= layer.expert_bytes:
        raise PlanError(
            f"rank={rank}: such a map takes {nbytes:,} bytes, an expert of layer {layer.index} {layer.expert_bytes:,}; "
            "ask for a lower rank"
        )
    if ranks == "chosen":
        return _chosen(layer, keep, rank, ridge, shared)
    scores = torch.tensor([_error(layer, expert, rank, ridge) for expert in range(layer.num_experts)])
    return keep_only(layer.num_experts, top(layer, scores, keep), _stand_in(rank, shared), scores.tolist())


def _stand_in(rank: int, shared: bool = False) -> Answer:
    return Linear(rank, shared) if rank else Constant()


def _inputs(layer: LayerView, token: torch.Tensor) -> torch.Tensor:
    return layer.sample.hidden[token].to(layer.experts.device, torch.promote_types(layer.experts.dtype, torch.float32))


def _regression(layer: LayerView, expert: int, which: torch.Tensor | None = None) -> Regression | None:
    """Return the regression of an expert's outputs on its sampled tokens, or some of them; None without tokens."""
    token, gate = layer.routed(expert)
    if which is not None:
        token, gate = token[which], gate[which]
    if not len(token):
        return None
    x_TD = _inputs(layer, token)
    return Regression(x_TD, layer.outputs(expert, token).to(x_TD.dtype), gate.double().square().to(x_TD.device))


def _error(layer: LayerView, expert: int, rank: int, ridge: float) -> float:
    """Return L_e(r) = sum_t g^2 |E_e(x_t) - S_e(x_t)|^2 / T of an expert's map, on the tokens it is fitted on."""
    sums = layer.sums
    # What the constant leaves, from the sums of all tokens: sum g^2 |y|^2 - |sum g^2 y|^2 / sum g^2
    constant = sums.gate_sq_norm_sq - sums.gate_sq_output.square().sum(1) / sums.gate_sq.clamp_min(1e-300)
    left = float(constant[expert].clamp_min(0)) / float(sums.tokens)
    problem = _regression(layer, expert) if rank else None
    if problem is None:
        return left
    token, gate = layer.routed(expert)
    weight = gate.double().square().to(layer.experts.device)
    errors = problem.solve(rank, ridge).errors(_inputs(layer, token), layer.outputs(expert, token), weight)
    # ... times the share of it that the map leaves on the sample
    return left * float(errors[-1] / errors[0].clamp_min(1e-300))


def _factors(
    problem: Regression | None, rank: int, ridge: float, common: torch.Tensor | None, layer: LayerView
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A [D, r], B [r, D] and m [D] of a map of exactly the rank, padded with zeros where tokens are too few."""
    width = layer.sample.hidden.shape[1]
    if problem is None:
        empty = torch.zeros(width, rank, dtype=torch.float64)
        return empty, empty.T, torch.zeros(width, dtype=torch.float64)
    found = problem.solve(rank, ridge) if common is None else problem.solve_with(common[:, :rank], ridge)
    inner, outer = found.inner.double().cpu(), found.outer.double().cpu()
    missing = rank - inner.shape[1]
    pad = torch.nn.functional.pad
    return pad(inner, (0, missing)), pad(outer, (0, 0, 0, missing)), found.mean_in.double().cpu()


def _chosen(layer: LayerView, keep: int, rank: int, ridge: float, shared: bool) -> LayerPlan:
    """Return the plan with the least held-out error in the bytes of `keep` experts and maps of a rank."""
    refuse_protected(layer.index, layer.protected, layer.num_experts, keep)
    prices = {rank: answers_nbytes([_stand_in(rank)], layer.shape, layer.dtype) for rank in RANKS}
    menu = [choice for choice in RANKS if prices[choice] < layer.expert_bytes]
    if shared:
        # The shared factor is paid for once, whatever is chosen: as wide as the given rank.
        menu = [choice for choice in menu if choice <= rank]
    # A row of one factor: the two of a rank, without the constant.
    row = (prices[1] - prices[0]) // 2
    spare = layer.nbytes - (rank * row if shared else 0)
    price = [prices[choice] - (choice * row if shared else 0) for choice in menu]
    errors = torch.stack([held_out_errors(layer, expert, menu, ridge) for expert in range(layer.num_experts)])
    (taken,) = cheapest([Menu(errors=errors, price=price, whole=layer.expert_bytes, kept=layer.protected)], spare)
    slots = tuple(Keep() if at == len(menu) else _stand_in(menu[at], shared) for at in taken)
    return LayerPlan(slots=slots, scores=tuple(errors[:, 0].tolist()))


def held_out_errors(layer: LayerView, expert: int, menu: Sequence[int], ridge: float) -> torch.Tensor:
    """Return the layer's error for each rank of a menu, measured on tokens that were not fitted, float64 [menu].

    An expert with too few tokens to hold some out is priced as one that only a constant can stand in for.
    """
    token, gate = layer.routed(expert)
    constant = _error(layer, expert, 0, ridge)
    total = torch.zeros(len(menu), dtype=torch.float64)
    for held in choosing(token, SCARCE * layer.sample.hidden.shape[1]):
        fit = _regression(layer, expert, ~held)
        if fit is None or not bool(held.any()):
            continue
        weight = gate[held].double().square().to(layer.experts.device)
        found = fit.solve(max(menu), ridge)
        errors = found.errors(_inputs(layer, token[held]), layer.outputs(expert, token[held]), weight).cpu()
        total += torch.stack([errors[min(choice, len(errors) - 1)] for choice in menu])
    return constant * total / total[0] if float(total[0]) > 0 else torch.full_like(total, constant)
