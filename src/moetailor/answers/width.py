"""How an expert lies in few bits: of each matrix how many, of what kind, and in which groups they share scales."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.storage import (
    WEIGHTS,
    BlockFloat8,
    Codebook,
    FewBits,
    Float8,
    Integers,
    MxFloat4,
    NvFloat4,
)
from moetailor.errors import PlanError
from moetailor.schema import Within

# Bits that say that weights lie as numbers of the experts' dtype.
NUMBERS = 16
# What codes are, see `Width`.
Kind = Literal["uint", "int", "vq", "fp8", "fp8b128", "mxfp4", "nvfp4"]
# Floats: each kind has one number of bits and one way to share scales.
FLOATS = {storage.name: storage for storage in (Float8(), BlockFloat8(), MxFloat4(), NvFloat4())}
# What is said of each but the default beside its bits.
WORDS = {"uint": "", "int": ", symmetric", "vq": ", vq", "fp8": ", floats", "fp8b128": ", floats in blocks"}
WORDS |= {"mxfp4": ", MXFP4", "nvfp4": ", NVFP4"}
# The most bits that codebooks have: wider matrices lie as integers.
VQ_BITS = max(WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Width:
    """How an expert lies in few bits.

    Attributes:
        bits: of a weight of the gate and up projections; 16 where all matrices lie as numbers: experts that were
            computed anew, where the others lie as the codes of a quantized original.
        down: of a weight of the down projection; `bits` when 0.
        group: inputs that share a scale, at most; widths are cut into the fewest groups, as equal as they can be.
        codes: what they are: integers with zero points or around zero, for matrices in 1 to 4 bits codes of tables,
            each of several weights, beside integers with zero points, or floats: of 8 bits with a scale for each row or
            for each block of 128 x 128, of 4 bits as MXFP4 or NVFP4.
    """

    bits: Annotated[int, Within(1, NUMBERS)]
    down: Annotated[int, Within(0, 8)] = 0
    group: Annotated[int, Within(1, 2**16)] = 128
    codes: Kind = "uint"

    def __post_init__(self) -> None:
        if self.whole and not self.down and self.codes == "uint":
            return
        if self.codes == "vq" and not 1 <= self.bits <= VQ_BITS:
            raise PlanError(f"vq{self.bits}: codebooks have 1 to {VQ_BITS} bits of gate and up")
        if self.codes in FLOATS:
            bits = FLOATS[self.codes].bits
            if self.both != (bits, bits) or self.group != Width.group:
                told = f"say bits={bits}, and neither down nor group"
                raise PlanError(f"{self.codes} has {bits} bits and groups of its own: {told}")
        for bits in self.both:
            if not 2 - (self.codes == "vq") <= bits <= 8:
                more = "; codebooks have 1, as vq1" if bits == 1 else ""
                raise PlanError(f"{bits} bit{'s' * (bits != 1)}: there are 2 to 8{more}")

    @property
    def both(self) -> tuple[int, int]:
        """The bits of the gate and up projections, and those of the down projection."""
        return self.bits, self.down or self.bits

    @property
    def whole(self) -> bool:
        """Whether weights lie as numbers."""
        return self.bits == NUMBERS

    @classmethod
    def parse(cls, text: str | int) -> Width:
        """Read ``4``, ``4/6`` where the down projection has other bits, ``int4g32``, or ``vq2/4`` and ``vq2g64``.

        Raises:
            PlanError: not such bits.
        """
        text = str(text).strip()
        kind: Any = text
        if match := re.fullmatch(r"([2-8])(?:/([2-8]))?", text):
            return cls(bits=int(match[1]), down=int(match[2] or 0))
        if match := re.fullmatch(r"(uint|int|vq)([1-8])(?:/([1-8]))?(?:g([1-9]\d{0,4}))?", text):
            kind = match[1]
            try:
                return cls(bits=int(match[2]), down=int(match[3] or 0), group=int(match[4] or cls.group), codes=kind)
            except PlanError as error:
                raise PlanError(f"--bits {text}: {error}") from None
        if text in FLOATS:
            return cls(bits=FLOATS[text].bits, codes=kind)
        raise PlanError(
            f"--bits {text}: write 2 to 8, or as 4/6 with those of the down projection, or as int4g32: symmetric, in "
            f"groups of 32 (uint4g32 with zero points), as vq2 or vq2/4: 1 to {VQ_BITS} bits from codebooks, or "
            f"{', '.join(FLOATS)}: floats"
        )

    def storages(self, shape: ExpertShape) -> dict[str, FewBits]:
        """Return how each matrix lies that lies in few bits.

        Args:
            shape: the layer's experts.
        """
        if self.whole:
            return {}
        bits = {name: self.down or self.bits if name == "down" else self.bits for name in shape.matrices}
        return {name: self._storage(b) for name, b in bits.items()}

    def _storage(self, bits: int) -> FewBits:
        if self.codes in FLOATS:
            return FLOATS[self.codes]
        if self.codes == "vq" and bits <= VQ_BITS:
            return Codebook(bits=bits, group=self.group)
        return Integers(bits=bits, group=self.group, symmetric=self.codes == "int")

    @property
    def width(self) -> Width:
        """The width alone."""
        return Width(bits=self.bits, down=self.down, group=self.group, codes=self.codes)

    @property
    def stem(self) -> str:
        """The start of the names of the tensors of this width."""
        bits = f"{self.codes}{self.bits}_{self.down or self.bits}_g{self.group}"
        return "packed_whole" if self.whole else f"packed_{self.codes if self.codes in FLOATS else bits}"

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        if self.codes in FLOATS:
            return self.codes
        bits = f"{self.bits}/{self.down}" if self.down else str(self.bits)
        plain = self.codes == Width.codes and self.group == Width.group
        return bits if plain else f"{self.codes}{bits}g{self.group}"

    def __str__(self) -> str:
        if self.whole:
            return "16 bits"
        alike = self.down in (0, self.bits)
        bits = f"{self.bits} bit{'s' * (self.bits > 1)}" if alike else f"{self.bits}/{self.down} bits"
        return bits + WORDS[self.codes]


WHOLE = Width(bits=NUMBERS)
