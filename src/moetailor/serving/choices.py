"""What a model can become to fit an engine and its memory: a few choices, each with its bytes and what it should cost.

Nothing is measured for that: config.json and headers are enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import exp, log, prod
from typing import Any

from moetailor.answers import Width
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorWarning, PlanError, TooSmallError
from moetailor.methods.estimate import estimate_plan
from moetailor.methods.method import Method
from moetailor.methods.registry import find_method
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.transform.formats import resolve_format
from moetailor.words import grade

# KL in nats a token by the bits that a weight of an expert has on average, as measured on the reference model (commit
# 3f77e0d, docs/bits.md): what each kind of choice may be expected to cost before anything is known of a model.
RULES: dict[str, dict[float, float]] = {
    "mixed": {10.8: 5e-6, 7.6: 2e-5, 5.5: 8e-5, 4.5: 2e-4, 3.5: 5e-4, 2.6: 2.2e-3, 1.6: 1.4e-2, 0.7: 0.21, 0.3: 0.8},
    "by layer": {10.2: 1.5e-5, 6.2: 2e-4, 5.5: 4.5e-4, 4.5: 1.6e-3, 3.5: 6.2e-3, 2.4: 3e-2, 2.2: 4e-2},
    "one width": {8.2: 3e-5, 6.2: 2e-4, 5.2: 6e-4, 4.2: 2.1e-3, 3.2: 7.8e-3, 2.2: 3.8e-2},
    # With fewer neurons where that loses less (benchmarks/README.md, commit 484a3fe); below 4 bits those of whole ones.
    "narrower experts": {12.0: 5.2e-3, 10.0: 1.7e-2, 8.0: 4.2e-2, 6.0: 9.5e-2, 4.0: 0.2, 2.5: 0.64},
    "fewer experts": {10.5: 1.8e-2, 7.5: 0.1, 5.5: 0.22, 4.5: 0.3, 3.5: 0.43, 2.5: 0.64},
    "fewer in 4 bits": {4.2: 2.1e-3, 3.4: 5e-3, 2.5: 4e-2, 1.5: 0.19, 0.6: 0.64},
    # GGUF, in bits as they are planned for it, with all else in Q8_0 (docs/formats.md, docs/serving.md); below 4.5 bits
    # what our own codes lose in as many.
    "GGUF": {8.7: 4e-4, 6.2: 9e-4, 5.8: 1.1e-3, 5.4: 1.4e-3, 4.9: 2.1e-3, 4.6: 2.6e-3, 3.6: 7.8e-3, 2.6: 3.8e-2},
    "fewer in GGUF": {4.5: 2.6e-3, 3.7: 5.5e-3, 2.7: 4e-2, 1.6: 0.19, 0.7: 0.64},
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to make a model fit.

    Attributes:
        name: what it is, in a few words.
        method: the method.
        parameters: those of the method.
        bits: the width of what stays of experts, as ``--bits``; as it lies when None.
        format: the form of the result.
        rule: by which of `RULES` its cost is guessed.
        loads: where the result loads.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    bits: str | None = None
    format: str = "auto"
    rule: str = "mixed"
    loads: str = ""

    @property
    def made_by(self) -> Method:
        """The method with its parameters."""
        return find_method(self.method).of(self.parameters)

    @property
    def width(self) -> Width | None:
        """The width of what stays; None where it lies as it did."""
        return None if self.bits is None else Width.parse(self.bits)

    def budget(self, room: int) -> Budget:
        """Return what it is asked to stay within; a method that takes one width for all has no say in that.

        Args:
            room: bytes that the tensors may take.
        """
        return Budget(size=room) if self.made_by.removes else Budget.parse(remove="0%")

    def estimate(self, facts: ModelFacts, room: int) -> Plan:
        """Return what is known of its plan without data.

        Raises:
            PlanError: it cannot be so small, or there is nothing to do.
        """
        method = self.made_by
        plan = estimate_plan(facts, method, self.budget(room), width=self.width)
        if plan.nbytes > room:
            raise TooSmallError(f"takes {plan.nbytes:,} bytes", plan.nbytes)
        whole = all(len(layer.pool) == len(layer.slots) for layer in plan.layers.values())
        if whole and not method.keeps_all:
            raise PlanError("nothing is left to remove")
        return plan


@dataclass(frozen=True, kw_only=True)
class Offered:
    """A choice for one model and one size.

    Attributes:
        choice: which.
        nbytes: bytes of its tensors, at most; the fewest that it can have where it does not fit.
        fits: whether it does.
        expected: KL in nats a token that it may cost by rule; None where it does not fit.
        why: why it does not fit; empty where it does.
    """

    choice: Choice
    nbytes: int
    fits: bool
    expected: float | None = None
    why: str = ""

    @property
    def grade(self) -> str:
        """What that means, in words."""
        assert self.expected is not None
        return grade(self.expected)

    def to_json(self) -> dict:
        """Return it as JSON values."""
        return asdict(self) | ({"grade": self.grade} if self.fits else {})


def offered(choices: Sequence[Choice], facts: ModelFacts, room: int, original: Original | None = None) -> list[Offered]:
    """Return choices with what they would take: those that fit first, what should cost least before the others.

    Args:
        choices: which.
        facts: the model.
        room: bytes that its tensors may take.
        original: the model, which a choice's format must be able to write; not looked at when None.
    """
    found = []
    for choice in choices:
        try:
            plan = choice.estimate(facts, room)
            if original is not None:
                _check_format(plan, choice.format, original)
        except TooSmallError as error:
            found.append(Offered(choice=choice, nbytes=error.least, fits=False, why="cannot be so small"))
        except PlanError as error:
            found.append(Offered(choice=choice, nbytes=0, fits=False, why=str(error)))
        else:
            # A method that fills a size is estimated by whole experts, and takes what is left, too.
            nbytes = room if choice.made_by.decides_counts else plan.nbytes
            nbytes = min(nbytes, facts.nbytes)
            expected = expected_of(choice.rule, bits_of(facts, nbytes))
            found.append(Offered(choice=choice, nbytes=nbytes, fits=True, expected=expected))
    return sorted(found, key=lambda offer: (not offer.fits, offer.expected or 0.0))


def _check_format(plan: Plan, name: str, original: Original) -> None:
    """Refuse what its format does not hold.

    Raises:
        PlanError: it does not.
    """
    with warnings.catch_warnings():
        # Which engines do not load it is known here: it is made for one.
        warnings.simplefilter("ignore", MoetailorWarning)
        resolve_format(plan, name, original).check(plan, original)


def bits_of(facts: ModelFacts, nbytes: int) -> float:
    """Return the bits that a weight of an expert has on average where all else stays as it lies.

    Args:
        facts: the model.
        nbytes: bytes of all tensors.
    """
    run = [(stack, stack.shape) for stack in facts.stacks if stack.shape is not None]
    numbers = sum(stack.num_experts * sum(map(prod, shape.tensors.values())) for stack, shape in run)
    experts = sum(stack.num_experts * stack.expert_bytes for stack, _ in run)
    return 8 * max(nbytes - (facts.nbytes - experts), 0) / max(numbers, 1)


def expected_of(rule: str, bits: float) -> float:
    """Return the KL that a rule says for some bits, between its points by their logarithms, beyond them as the last."""
    points = sorted(RULES[rule].items())
    for (low, worse), (high, better) in pairwise(points):
        if bits <= high:
            part = (max(bits, low) - low) / (high - low)
            return exp(log(worse) * (1 - part) + log(better) * part)
    return points[-1][1]
