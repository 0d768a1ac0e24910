"""What a router would do with some of its slots dropped, found from a sample of what it did.

Shapes: T tokens, E experts, K experts of a token, S sets of slots that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.family import Groups
from moetailor.errors import PlanError

# Gates may differ by so much of a token's largest one (bfloat16 rounds to a part in 256), and of so many tokens.
ROUNDING, UNLIKE = 0.01, 0.05


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A rule that gives gates from logits: of the slots that stay, the K with the largest scores are chosen.

    Scores are the logits, or what a correction bias makes of them; gates never have the bias in them.

    Attributes:
        logits: router logits of some tokens, [T, E].
        top_k: K.
        groups: how groups limit the choice.
        sigmoid: probabilities are sigmoids of the logits, not their softmax over the slots that stay.
        normalised: the chosen probabilities are divided by their sum.
        scale: factor on all gates.
        bias: correction bias, [E].
        on_logits: it is added to the logits, not to the probabilities.
    """

    logits: torch.Tensor
    top_k: int
    groups: Groups
    sigmoid: bool
    normalised: bool
    scale: float = 1.0
    bias: torch.Tensor | None = None
    on_logits: bool = False

    def gates(self, kept_SE: torch.Tensor) -> torch.Tensor:
        """Return the gates when only some slots stay, zero for what is not chosen, [S, T, E].

        Args:
            kept_SE: which slots stay.
        """
        score_STE, probability_STE = self.scores(kept_SE)
        chosen_STK = self._allowed(score_STE, probability_STE).topk(self.top_k).indices
        gate_STK = probability_STE.gather(-1, chosen_STK)
        if self.normalised:
            gate_STK = gate_STK / gate_STK.sum(-1, keepdim=True)
        return torch.zeros_like(score_STE).scatter_(-1, chosen_STK, self.scale * gate_STK)

    def scores(self, kept_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores when only some slots stay, minus infinity for the others, and probabilities, [S, T, E]."""
        logits_STE = torch.where(kept_SE[:, None], self.logits, -torch.inf)
        probability_STE = logits_STE.sigmoid() if self.sigmoid else logits_STE.softmax(-1)
        if self.bias is None:
            return logits_STE, probability_STE
        score_STE = (logits_STE if self.on_logits else probability_STE) + self.bias
        return torch.where(kept_SE[:, None], score_STE, -torch.inf), probability_STE

    def _allowed(self, score_STE: torch.Tensor, probability_STE: torch.Tensor) -> torch.Tensor:
        """Return the scores without those of groups that a token may not use: the best groups by the sum of their
        largest probabilities, or corrected scores, may be.
        """
        if self.groups.count == 1:
            return score_STE
        added_STE = probability_STE if self.bias is None else score_STE
        best = added_STE.unflatten(-1, (self.groups.count, -1)).topk(self.groups.least).values.sum(-1)
        barred = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(self.groups.used).indices, False)
        size = score_STE.shape[-1] // self.groups.count
        return score_STE.masked_fill(barred.repeat_interleave(size, -1), -torch.inf)


def routing_of(sample: Sample, groups: Groups, bias_E: torch.Tensor | None, where: str) -> tuple[Routing, torch.Tensor]:
    """Return the rule that gives a sample's own gates, and for which tokens it gives them to the same experts, [T].

    Where rounded logits tie, a router may have chosen either.

    Args:
        sample: sampled tokens of a layer.
        groups: how groups limit the router's choice.
        bias_E: its correction bias, if it has one.
        where: the layer and method, for the message.

    Raises:
        PlanError: no rule known here gives them.
    """
    own_TE = own_gates(sample)
    rules = (
        Routing(
            logits=sample.logits,
            top_k=sample.index.shape[1],
            groups=groups,
            sigmoid=sigmoid,
            normalised=normalised,
            bias=bias,
            on_logits=on_logits,
        )
        for sigmoid, normalised in product((False, True), (True, False))
        for bias, on_logits in ([(None, False)] if bias_E is None else product(_as_run(bias_E), (False, True)))
    )
    found = [_compared(rule, own_TE) for rule in rules]
    rule, chose_T, weighed_T, same_T = max(found, key=lambda one: int((one[1] & one[2]).sum()))  # of equals the first
    wrong, unlike = (1 - float(mask.double().mean()) for mask in (chose_T, chose_T & weighed_T))
    if unlike > UNLIKE or not bool(same_T.any()):
        scores = "logits" if bias_E is None else "logits or probabilities, its correction bias added"
        reason = (
            f"for {wrong:.0%} of the sampled tokens it did not choose the largest {scores}"
            if wrong > UNLIKE
            else f"for {unlike:.0%} of the sampled tokens its gates are no softmax or sigmoid of its logits"
        )
        raise PlanError(
            f"{where}: what the router would do without some slots is not known here: {reason}; use a method that "
            "scores experts one by one, such as reap"
        )
    return rule, same_T


def _as_run(bias_E: torch.Tensor) -> list[torch.Tensor]:
    """Return what a bias may have been when the router ran: itself, or rounded with all other weights."""
    rounded = bias_E.bfloat16().float()
    return [bias_E] if torch.equal(rounded, bias_E) else [bias_E, rounded]


def _compared(rule: Routing, own_TE: torch.Tensor) -> tuple[Routing, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare a rule with what the router did for some tokens.

    Returns:
        The rule with the scale that fits the gates, and three masks [T]: tokens for which the chosen scores have the
        same sum, tokens with the same gates in some order, and tokens with the same gates for the same experts.
    """
    every_SE = torch.ones(1, own_TE.shape[1], dtype=torch.bool)
    gate_TE, score_TE = rule.gates(every_SE)[0], rule.scores(every_SE)[0][0]
    both = (gate_TE > 0) & (own_TE > 0)
    scale = float((own_TE[both] / gate_TE[both]).median()) if bool(both.any()) else 1.0
    gate_TE, limit = scale * gate_TE, ROUNDING * own_TE.amax(1, keepdim=True)
    chosen, own = (torch.where(gates > 0, score_TE, 0).sum(1) for gates in (gate_TE, own_TE))
    weighed_T = ((gate_TE.sort(1).values - own_TE.sort(1).values).abs() <= limit).all(1)
    same_T = ((gate_TE - own_TE).abs() <= limit).all(1)
    return replace(rule, scale=scale), torch.isclose(chosen, own, atol=1e-5), weighed_T, same_T


def own_gates(sample: Sample) -> torch.Tensor:
    """Return the gates of sampled tokens with a column for each expert, zero where it was not chosen, [T, E]."""
    return torch.zeros_like(sample.logits).scatter_(1, sample.index.long(), sample.gate)
