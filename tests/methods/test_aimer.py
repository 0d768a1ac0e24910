"""AIMER on experts of six weights worked by hand: of equal sizes, of one, of two, of zeros, and equal in each matrix.

expert 0: all +-2                 mean |w| 2      rms 2             AIMER 1
expert 1: one 5                   mean |w| 5/6    rms 5/sqrt(6)     AIMER 1/sqrt(6) = .408
expert 2: 3 and 4                 mean |w| 7/6    rms 5/sqrt(6)     AIMER 7/(5 sqrt(6)) = .572
expert 3: zeros
expert 4: 1 1, 1 1, 3 3           mean |w| 10/6   rms sqrt(22/6)    AIMER 10/sqrt(132) = .870
"""

import pytest
import torch
from torch import nn

from moetailor.calibration.statistics import Sums
from moetailor.methods.aimer import Aimer
from moetailor.planning.view import LayerView
from support.hand import TinyExperts, layer_of

WEIGHTS = torch.tensor(
    [
        [2.0, -2.0, -2.0, 2.0, 2.0, -2.0],
        [0.0, 0.0, -5.0, 0.0, 0.0, 0.0],
        [3.0, 4.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, -1.0, 3.0, 3.0],
    ]
)
# The highest stay, so plans hold the reciprocals.
SCORES = pytest.approx((1, 6**0.5, 5 * 6**0.5 / 7, 1, 132**0.5 / 10), rel=1e-5)


def hand_layer(module: nn.Module | None = None, **fields: object) -> LayerView:
    """Return a layer of two inputs and one neuron; nothing was measured of it, and it has no sample."""
    gate, up, down = WEIGHTS.split(2, 1)
    module = TinyExperts(gate[:, None], up[:, None], down[:, :, None]) if module is None else module
    return layer_of(Sums.zeros(len(WEIGHTS), 2), module=module, **fields)


def test_scores_and_choice() -> None:
    plan = Aimer().plan(hand_layer(), 2)
    assert plan.scores == SCORES
    assert plan.pool == plan.kept_slots == [1, 2]
    assert Aimer().plan(hand_layer(), 3).pool == [1, 2, 4]
    assert Aimer().plan(hand_layer(protected=frozenset({3})), 2).pool == [1, 3]


def test_size_and_biases_do_not_count() -> None:
    layer = hand_layer()
    module = layer.experts.module
    with torch.no_grad():
        module.down_proj[2] *= 1024
        module.gate_up_proj[2] *= 1024
    module.down_proj_bias = nn.Parameter(torch.full((len(WEIGHTS), 2), 100.0))
    assert Aimer().plan(hand_layer(module), 2).scores == SCORES


def test_half_width_is_added_up_in_full() -> None:
    ones = torch.ones(2, 50, 30)
    module = TinyExperts(ones, 3 * ones, 2 * ones.transpose(1, 2)).bfloat16()
    # |w| of 1, 2 and 3 as often: mean 2, rms sqrt(14/3)
    assert Aimer().plan(layer_of(Sums.zeros(2, 30), module=module), 1).scores == pytest.approx(
        [14**0.5 / 12**0.5] * 2, 1e-5
    )
