"""How much work a stage does, by how fast it goes: what estimates of time are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from moetailor.checkpoint.experts import ExpertShape


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work, by kind; ``a + b`` is both, ``3 * a`` is that three times.

    Attributes:
        products: FLOPs of matrix products in the dtype of the run.
        doubles: FLOPs of products, Cholesky factors and solves in float64.
        spectra: FLOPs of eigenvalues and singular values in float64.
        elements: numbers that are gone over, once for each operation.
        steps: operations that are begun, whatever their size.
        nbytes: bytes of memory that are taken at once; of both the larger, and for three times no more than for once.
    """

    products: float = 0
    doubles: float = 0
    spectra: float = 0
    elements: float = 0
    steps: float = 0
    nbytes: int = 0

    def __add__(self, other: Work) -> Work:
        added = {name: getattr(self, name) + getattr(other, name) for name in KINDS}
        return Work(**added, nbytes=max(self.nbytes, other.nbytes))

    def __rmul__(self, times: float) -> Work:
        return Work(**{name: times * getattr(self, name) for name in KINDS}, nbytes=self.nbytes)

    def __bool__(self) -> bool:
        return any(astuple(self))


KINDS = ("products", "doubles", "spectra", "elements", "steps")


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One MoE layer as far as work depends on it.

    Attributes:
        experts: how many.
        top_k: experts of a token.
        shape: what an expert is made of.
        sampled: tokens of which the layer's inputs are kept, N.
        counts: how many of them each expert has; empty where nobody knows, as many each then.
    """

    experts: int
    top_k: int
    shape: ExpertShape
    sampled: int
    counts: tuple[int, ...] = ()

    @property
    def tokens(self) -> float:
        """Sampled tokens of an expert, on average, n."""
        return self.sampled * self.top_k / self.experts

    @property
    def each(self) -> Sequence[float]:
        """Sampled tokens of each expert, or of one where all have as many."""
        return self.counts or (self.tokens,)

    @property
    def weights(self) -> int:
        """Weights of an expert."""
        return sum(rows * columns for rows, columns in self.shape.matrices.values())
