"""How redundant the experts of each layer are: numbers for every expert, and those that need not be stored.

Errors are those of the layer's routed output: sum_t g^2 |E(x_t) - S(x_t)|^2 / T when S stands in for expert E, with g
its gate; energy is the same without a stand-in, sum_t g^2 |E(x_t)|^2 / T. Errors of several experts are added up as if
they were independent.
Shapes: E experts, R stand-ins (a constant, then maps of rising rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import PlanError
from moetailor.fitting.distances import functional_distances
from moetailor.fitting.linear_maps import held_out_errors
from moetailor.inspection.buddies import Buddy, buddies
from moetailor.inspection.verdict import Lost, spread, verdict, weighed, widths_told
from moetailor.methods.run import check_weights, view_of
from moetailor.planning.budget import Budget
from moetailor.planning.view import LayerView
from moetailor.progress import Progress

RANKS, RIDGE = (0, 2, 4, 8, 16), 0.01
STAND_INS = ("constant", *(f"rank {rank}" for rank in RANKS[1:]))
REMOVE = ("10%", "25%", "50%")
# What leaves no more of an expert's energy answers for it; fewer tokens are no evidence of that, one is its own mean.
NOTHING, FEW = 0.01, 16

Kind = Literal["dead", "constant", "duplicate", "scaled", "linear"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An expert that need not be stored.

    Attributes:
        expert: which.
        kind: no token reached it (``dead``), or less than a hundredth of its energy is lost when a constant answers for
            it (``constant``), another expert (``duplicate``), another one times a factor (``scaled``), or an affine map
            of low rank (``linear``). The first that holds is named.
        of: that other expert.
        factor: that factor.
        rank: that rank, the lowest of those tried.
    """

    expert: int
    kind: Kind
    of: int | None = None
    factor: float = 1.0
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class ExpertRedundancy:
    """One expert.

    Attributes:
        expert: which.
        usage: its share of the layer's routed pairs.
        companion: the expert that most often runs on the same tokens; None when none ever does.
        together: the share of its tokens that this one runs on too.
        buddies: the experts whose output, times a factor, gives most of its own, nearest first.
        energy: its energy.
        left: what each of `STAND_INS` leaves of that, on tokens that it was not fitted on.
    """

    expert: int
    usage: float
    companion: int | None
    together: float
    buddies: tuple[Buddy, ...]
    energy: float
    left: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LayerRedundancy:
    """One layer.

    Attributes:
        layer: number of the decoder layer.
        entropy: of the usage of its experts, in bits.
        used: 2^entropy: so many experts, equally used, have that entropy.
        together: mean over experts of the largest share of their tokens that another one runs on too.
        most_together: the largest of these shares.
        least_distance: the least distance of an expert to its nearest one.
        mean_distance: the mean of these distances over experts that were reached.
        energy: sum of the energies of its experts.
        sensitivity: nats a token that a unit of squared error a token costs; None when it was not recorded.
        explained: share of the energy that each of `STAND_INS` explains when it answers for every expert.
        lost: for each share of `REMOVE`, the share of the energy that is lost when each of `STAND_INS` answers for that
            share of the experts, those that it answers for best.
        findings: experts that need not be stored.
        experts: every expert.
    """

    layer: int
    entropy: float
    used: float
    together: float
    most_together: float
    least_distance: float
    mean_distance: float
    energy: float
    sensitivity: float | None
    explained: dict[str, float]
    lost: Lost
    findings: tuple[Finding, ...]
    experts: tuple[ExpertRedundancy, ...]


@dataclass(frozen=True, kw_only=True)
class Redundancy:
    """A whole model.

    Attributes:
        tokens: tokens that were calibrated on.
        layers: its MoE layers.
        lost: mean over layers of what they lose.
        kl: what the predictions are expected to lose, nats a token; None when sensitivities were not recorded.
        spread: see `verdict.spread`, over ``experts`` and over ``layers``; None when sensitivities were not recorded.
        verdict: how far it is safe to go, in words.
    """

    tokens: int
    layers: tuple[LayerRedundancy, ...]
    lost: Lost
    kl: Lost | None
    spread: dict[str, float] | None
    verdict: str

    def to_json(self) -> dict:
        """Return all numbers as JSON values."""
        return asdict(self)


def find_redundancy(
    calibration: Calibration,
    *,
    weights: ExpertWeights | None = None,
    tokens: int = 128,
    progress: Progress | None = None,
) -> Redundancy:
    """Say how redundant the experts of a model are and how far it is safe to go.

    One layer is in memory at a time; see `layer_redundancy` for what it takes.

    Args:
        calibration: a finished calibration.
        weights: where the experts are; the calibrated checkpoint when None.
        tokens: sampled tokens of each expert on which it is compared with the others.
        progress: called with (layers done, layers in all).

    Raises:
        PlanError: the weights are not those of the calibrated model, or it was in memory and none are given.
    """
    if weights is None and not calibration.model.source:
        raise PlanError("inspecting reads expert weights, and the model was calibrated in memory; pass weights=")
    weights = weights or ExpertWeights(calibration.model.source)
    check_weights(weights, calibration.model)
    layers = []
    for index in calibration.layers:
        view = view_of(calibration, index, weights)
        layers.append(layer_redundancy(view, tokens))
        view.close()
        if progress is not None:
            progress(len(layers), len(calibration.layers))
    lost = weighed([(1 / len(layers), layer.lost) for layer in layers])
    # The sum over layers of sensitivity x squared error.
    costs = [(layer.sensitivity * layer.energy, layer.lost) for layer in layers if layer.sensitivity is not None]
    kl = weighed(costs) if costs else None
    noise = None if calibration.prices is None else calibration.prices.noise
    spreads = None if noise is None else spread_of([(noise[layer.layer], layer) for layer in layers])
    return Redundancy(
        tokens=calibration.fingerprint["text"]["counted"],
        layers=tuple(layers),
        lost=lost,
        kl=kl,
        spread=spreads,
        verdict=" ".join([verdict(lost, kl), *([] if spreads is None else [widths_told(spreads)])]),
    )


def spread_of(layers: Sequence[tuple[float, LayerRedundancy]]) -> dict[str, float]:
    """Return how much what rounding an expert costs differs, see `spread`: an expert's noise is a share of its energy.

    Args:
        layers: what noise costs in each layer, and the layer.
    """
    each = [[price * expert.energy for expert in layer.experts] for price, layer in layers]
    return {"experts": spread([cost for costs in each for cost in costs]), "layers": spread([sum(c) for c in each])}


@torch.no_grad()
def layer_redundancy(layer: LayerView, tokens: int = 128) -> LayerRedundancy:
    """Measure one layer.

    Maps are fitted expert by expert on all sampled tokens. Outputs of all pairs of experts would not fit in memory for
    wide layers, so experts are compared on a few tokens each, one answering expert at a time: of the order of
    E x tokens x (D + F) numbers.

    Args:
        layer: the layer.
        tokens: sampled tokens of each expert on which it is compared with the others.
    """
    sums, experts = layer.sums, range(layer.num_experts)
    energy_E = sums.gate_sq_norm_sq / sums.tokens
    left_ER = torch.stack([held_out_errors(layer, expert, RANKS, RIDGE) for expert in experts])
    distance_EE, factor_EE = functional_distances([layer], tokens, True, limits=(-math.inf, math.inf))
    usage_E = sums.count / sums.count.sum()
    together_EE = (sums.together / sums.count.clamp_min(1)[:, None]).fill_diagonal_(0)
    together, companion = (part.tolist() for part in together_EE.max(1))
    distance = distance_EE.clone().fill_diagonal_(math.inf).amin(1).tolist()
    ranked = buddies(distance_EE, factor_EE, together_EE)
    entropy, energy = float(torch.special.entr(usage_E).sum()) / math.log(2), float(energy_E.sum())
    reached = [expert for expert in experts if energy_E[expert] > 0]
    return LayerRedundancy(
        layer=layer.index,
        entropy=entropy,
        used=2**entropy,
        together=_mean([together[expert] for expert in experts if sums.count[expert]]),
        most_together=max(together),
        least_distance=min((distance[expert] for expert in reached), default=1.0),
        mean_distance=_mean([distance[expert] for expert in reached]),
        energy=energy,
        sensitivity=layer.sensitivity,
        explained=_named(1 - left_ER.sum(0) / max(energy, 1e-300)),
        lost={share: _named(_least(left_ER, share) / max(energy, 1e-300)) for share in REMOVE},
        findings=tuple(_findings(sums.count, energy_E, left_ER, distance_EE, factor_EE)),
        experts=tuple(
            ExpertRedundancy(
                expert=expert,
                usage=float(usage_E[expert]),
                companion=companion[expert] if together[expert] else None,
                together=together[expert],
                buddies=ranked[expert],
                energy=float(energy_E[expert]),
                left=_named(left_ER[expert]),
            )
            for expert in experts
        ),
    )


def _least(left_ER: torch.Tensor, share: str) -> torch.Tensor:
    """Return the sum of the least errors of a share of the experts, for each stand-in, [R]."""
    removed = len(left_ER) - Budget.parse(remove=share).kept(len(left_ER))
    return left_ER.sort(0).values[:removed].sum(0)


def _findings(
    count_E: torch.Tensor,
    energy_E: torch.Tensor,
    left_ER: torch.Tensor,
    distance_EE: torch.Tensor,
    factor_EE: torch.Tensor,
) -> list[Finding]:
    """Return the experts that need not be stored, by number."""
    enough_ER = (left_ER <= NOTHING * energy_E[:, None]) & (count_E >= FEW)[:, None]
    light: dict[int, Kind] = {e: "constant" for e in enough_ER[:, 0].nonzero().flatten().tolist()}
    light |= {e: "dead" for e in (count_E == 0).nonzero().flatten().tolist()}
    found = [Finding(expert=expert, kind=kind) for expert, kind in light.items()]
    copies: set[int] = set()
    # From the last to the first, so that of experts that answer for each other the first is the original.
    for expert in reversed([e for e in range(len(count_E)) if e not in light]):
        near = (distance_EE[expert] <= NOTHING).nonzero().flatten().tolist()
        originals = [other for other in near if other != expert and other not in copies and other not in light]
        if originals:
            copies.add(expert)
            factor = float(factor_EE[expert, originals[0]])
            kind: Kind = "duplicate" if abs(factor - 1) <= NOTHING else "scaled"
            found.append(Finding(expert=expert, kind=kind, of=originals[0], factor=factor))
        elif bool(enough_ER[expert].any()):
            found.append(Finding(expert=expert, kind="linear", rank=RANKS[int(enough_ER[expert].int().argmax())]))
    return sorted(found, key=lambda finding: finding.expert)


def _named(values_R: torch.Tensor) -> dict[str, float]:
    return dict(zip(STAND_INS, values_R.tolist(), strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
