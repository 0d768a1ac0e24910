"""NAEE: of all subsets of a layer's experts, the one whose output is nearest to that of all (arXiv:2402.14800).

Published: for each layer every subset C of the given size is tried on calibration text; the logits of the others are
set to minus infinity, so that the router chooses and weighs anew among C, and the subset with the least sum over
batches of |F(X) - F_C(X)| stays. With many experts later papers try subsets drawn at random.

Here: the same, with all experts run once on sampled tokens, after which a subset costs only its gates. Norms are over
all these tokens together, not batch by batch, and each layer sees the inputs of the original. How the router weighs is
found from its own gates on these tokens and its correction bias, if it has one; where no known rule gives them, as for
phimoe, whose gates are each a softmax over the logits near its own, the method refuses. Tokens whose own choice is not
that of the rule, because rounded logits tie, are left out. Beyond it, by parameter: the best subset is improved by
exchanging one expert at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moetailor.answers import Drop
from moetailor.methods.method import AtLeast, Method
from moetailor.methods.registry import register
from moetailor.methods.subsets import best_subset
from moetailor.planning.layer_plan import LayerPlan, keep_only
from moetailor.planning.view import LayerView


@register
@dataclass(frozen=True, kw_only=True)
class Naee(Method):
    """Keep the subset of experts whose output is nearest to that of all.

    Attributes:
        exhaustive: up to so many subsets all are tried (paper); of more, some drawn at random.
        samples: how many are drawn.
        swaps: so many times the best exchange of a kept expert for a dropped one is made, as long as one helps.
        tokens: sampled tokens that every expert is run on.
        seed: another seed draws other subsets.
    """

    exhaustive: Annotated[int, AtLeast(0)] = 10_000
    samples: Annotated[int, AtLeast(1)] = 1000
    swaps: Annotated[int, AtLeast(0)] = 0
    tokens: Annotated[int, AtLeast(1)] = 512
    seed: int = 0

    name = "naee"
    paper = "arXiv:2402.14800"
    reads_weights = True
    slow = True
    scores = False

    def plan(self, layer: LayerView, keep: int) -> LayerPlan:
        """Try the subsets of one layer."""
        return keep_only(layer.num_experts, best_subset(layer, keep, self.name, **self.parameters), Drop())
