"""Every answer of the format on random numbers: the plug-in against moetailor's own runtime. Needs no vLLM."""

import pytest
import torch

from moetailor.answers import Packed, SlotMap
from moetailor_vllm.stored import Rank
from support_vllm import call, everything, moetailor_layer, pooled, served, slot_map

UINT, SYMMETRIC, FP8 = Packed(bits=4, down=6), Packed(bits=3, codes="int", group=32), Packed(bits=8, codes="fp8")
CODEBOOK, WIDE = Packed(bits=2, down=5, codes="vq", group=16), Packed(bits=8, group=7)
MAPS = {
    "everything": everything(),
    "with widths": everything((2, UINT), (3, SYMMETRIC), (2, UINT)),
    "all in few bits": slot_map(6, *((row, width) for row, width in enumerate([UINT, FP8, CODEBOOK, UINT, WIDE, CODEBOOK]))),
    "a pool alone": slot_map(3, 0, 2, 1, 2, scaled=True),
}


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("slots", MAPS.values(), ids=MAPS)
def test_answers_are_moetailors(slots: SlotMap, tokens: int) -> None:
    module = moetailor_layer(slots)
    answers = served(slots, module)
    x, chosen, gates = call(slots, tokens)
    weights = gates * answers.scale[chosen]
    row, weight = answers.rows(chosen, weights)
    assert (row >= 0).all()
    got = pooled(module, x, row, weight) if slots.plain_pool else torch.zeros_like(x)
    got = got + answers.given(x, chosen, weights)
    torch.testing.assert_close(got, module(x, chosen, gates), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("slots", [MAPS["with widths"], MAPS["everything"], slot_map(3, *((n, CODEBOOK) for n in range(3)))])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up_to_one(slots: SlotMap, ranks: int) -> None:
    module = moetailor_layer(slots)
    x, chosen, gates = call(slots, 20)
    whole = served(slots, module).given(x, chosen, gates)
    parts = [served(slots, module, Rank(number, ranks)).given(x, chosen, gates) for number in range(ranks)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
