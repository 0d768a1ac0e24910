"""Plans whose every slot is known."""

import moetailor
from moetailor.answers import Answer, Borrowed, Constant, Drop, Keep, Linear, LowRank, Merged, Remap
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.checkpoint.layout import Stack
from moetailor.planning.layer_plan import LayerPlan

KEEP, DROP, CONSTANT = Keep(), Drop(), Constant()
# Experts of 1000 bytes, two of them of the router: slots of 100.
FACTS = ModelFacts(
    source="a/model",
    fingerprint={},
    model_type="olmoe",
    width=10,
    top_k=2,
    groups=Groups(),
    nbytes=100_000,
    stacks=tuple(
        Stack(
            prefix=f"model.layers.{n}",
            index=n,
            num_experts=12,
            expert_bytes=1000,
            slot_bytes=100,
            dtype="F32",
            shape=ExpertShape(width=10, intermediate=8),
        )
        for n in range(4)
    ),
)


def layer(*slots: Answer, **fields: object) -> LayerPlan:
    return LayerPlan(slots=(*slots, *(KEEP,) * (12 - len(slots))), **fields)


def plan(method: str, *layers: LayerPlan, **fields: object) -> moetailor.Plan:
    named = {f"model.layers.{number}": found for number, found in enumerate(layers)}
    given = {"parameters": {"rank": 8}, "budget": "remove 25%", "model": FACTS, "calibration": "0"} | fields
    return moetailor.Plan(method=method, layers=named, **given)


# Layer 0 has each kind of stand-in, layer 1 merges, layer 2 shares and has low ranks, layer 3 stays whole.
MIXED = plan(
    "mixed",
    layer(CONSTANT, Linear(4), Linear(8), KEEP, Linear(8), scores=range(12)),
    layer(Merged(1), Merged(1), KEEP, Drop(1), DROP),
    layer(
        Remap(3),
        Remap(3, 0.5),
        Borrowed(3, 3),
        KEEP,
        *[LowRank(4, 16)] * 3,
    ),
)
