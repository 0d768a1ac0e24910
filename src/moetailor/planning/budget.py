"""What a user asks for, as whole numbers: ``25%``, ``keep 48``, ``12GB``. No float decides a count."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from moetailor.errors import PlanError, did_you_mean

# With or without the B that ends them
UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}{ending}": 1000**power for power, letter in enumerate("KMGT", 1) for ending in ("", "B")}
UNITS |= {f"{letter}I{ending}": 1024**power for power, letter in enumerate("KMGT", 1) for ending in ("", "B")}
# Bytes of a number as it is loaded, and as safetensors stores it.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Budget:
    """Exactly one of five limits.

    Attributes:
        remove: share of each layer's experts to remove, 0 <= share < 1.
        keep: experts to keep in each layer.
        size: bytes that the tensors of the written checkpoint may take.
        share: the same as a share of the original's, 0 < share <= 1.
        memory: bytes that they may take once loaded.
        load_dtype: dtype that they are loaded in, for `memory`; as they are stored when None.
    """

    remove: Fraction | None = None
    keep: int | None = None
    size: int | None = None
    memory: int | None = None
    load_dtype: str | None = None
    share: Fraction | None = None

    def __post_init__(self) -> None:
        limits = (self.remove, self.keep, self.size, self.share, self.memory)
        if (given := sum(limit is not None for limit in limits)) != 1:
            raise PlanError(f"{given} budgets given; give exactly one of --remove, --keep, --size and --memory")
        if self.load_dtype is not None and self.memory is None:
            raise PlanError(f"--load-dtype {self.load_dtype}: says how --memory is counted; give that too")
        if self.load_dtype not in (None, *WIDTHS):
            raise PlanError(f"--load-dtype {self.load_dtype}" + did_you_mean(self.load_dtype or "", WIDTHS))

    def __str__(self) -> str:
        if self.remove is not None:
            return f"remove {percent(self.remove)}"
        if self.share is not None:
            return f"size {percent(self.share)}"
        if self.keep is not None:
            return f"keep {self.keep}"
        if self.size is not None:
            return f"size {self.size} bytes"
        return f"memory {self.memory} bytes" + (f" in {self.load_dtype}" if self.load_dtype else "")

    def kept(self, experts: int) -> int:
        """Return how many of a layer's experts stay: experts - floor(experts x share), or the number asked for.

        Raises:
            PlanError: more experts are to be kept than there are, or none; or the budget is one of bytes.
        """
        if self.remove is not None:
            return experts - experts * self.remove.numerator // self.remove.denominator
        if self.keep is None:
            raise PlanError("a budget in bytes says nothing about one layer")
        if not 1 <= self.keep <= experts:
            raise PlanError(f"--keep {self.keep}: the layers have {experts} experts; keep 1 to {experts}")
        return self.keep

    def in_bytes(self, nbytes: int) -> Budget:
        """Return the budget with a share of the original's bytes as a size, rounded down.

        Args:
            nbytes: bytes of all tensors of the original.
        """
        return self if self.share is None else Budget(size=int(nbytes * self.share))

    def of_total(self, nbytes: int) -> Budget:
        """Return the budget with a share to remove taken of all bytes.

        Args:
            nbytes: bytes of all tensors.
        """
        return self if not self.remove else Budget(size=nbytes - int(nbytes * self.remove))

    def on_disk(self, dtypes: Mapping[str, int], experts: Collection[str], router: int = 0) -> Budget:
        """Return the budget with bytes in memory turned into bytes on disk.

        Each byte that goes from the disk is counted as one of the widest experts', which save the least in memory. Of
        the router's rows, whose dtype may be wider, nothing is counted as saved.

        Args:
            dtypes: bytes of the original's tensors by dtype, as safetensors names them.
            experts: dtypes of the experts.
            router: bytes of the rows that may be dropped from routers.

        Raises:
            PlanError: the weights are not stored as floating-point numbers that could be loaded in another dtype.
        """
        if self.memory is None:
            return self
        if self.load_dtype is None:
            return Budget(size=self.memory)
        if not dtypes:
            raise PlanError(f"--load-dtype {self.load_dtype}: an older calibration does not say how weights are stored")
        if other := sorted(set(experts) - set(STORED)):
            raise PlanError(f"--load-dtype {self.load_dtype}: experts are stored as {other[0]}; leave it out")
        wide, stored = WIDTHS[self.load_dtype], max(STORED[dtype] for dtype in experts)
        loaded = sum(nbytes * wide // STORED.get(dtype, wide) for dtype, nbytes in dtypes.items())
        # What goes from the disk goes from memory in the ratio of the widths.
        removed = -(-(loaded - self.memory) * stored // wide)
        return Budget(size=max(0, sum(dtypes.values()) - removed - (router if removed > 0 and len(dtypes) > 1 else 0)))

    @classmethod
    def parse(
        cls,
        *,
        remove: str | float | None = None,
        keep: int | None = None,
        size: str | float | None = None,
        memory: str | int | None = None,
        load_dtype: str | None = None,
    ) -> Budget:
        """Read the flags.

        Args:
            remove: ``25%``, ``0.25`` or ``1/4``.
            keep: a number of experts.
            size: bytes, a number with a unit (``12GB`` is 12 x 10^9, ``12GiB`` is 12 x 2^30), or ``60%`` of the
                original's bytes.
            memory: bytes, or a number with a unit.
            load_dtype: ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            PlanError: not exactly one is given, or one cannot be read.
        """
        of_original = str(size).strip().endswith("%")
        return cls(
            remove=None if remove is None else parse_share(remove),
            keep=keep,
            size=None if size is None or of_original else parse_bytes(size),
            share=parse_part(str(size)) if of_original else None,
            memory=None if memory is None else parse_bytes(memory, "--memory"),
            load_dtype=load_dtype,
        )


def parse_share(text: str | float) -> Fraction:
    """Read ``25%``, ``0.25`` or ``1/4`` exactly.

    Raises:
        PlanError: not a share, or not in [0, 1).
    """
    text = str(text).strip()
    try:
        share = read_fraction(text)
    except ValueError:
        raise PlanError(f"--remove {text}: not a share; write 25% or 0.25") from None
    if not 0 <= share < 1:
        guess = f"; did you mean {text}%?" if 1 <= share < 100 and not text.endswith("%") else ""
        raise PlanError(f"--remove {text}: must be at least 0% and below 100%{guess}")
    return share


def parse_part(text: str, flag: str = "--size") -> Fraction:
    """Read ``60%`` exactly.

    Raises:
        PlanError: not a share, or not in (0, 1].
    """
    try:
        share = read_fraction(text)
    except ValueError:
        raise PlanError(f"{flag} {text.strip()}: not a share of the bytes; write 60%") from None
    if not 0 < share <= 1:
        raise PlanError(f"{flag} {text.strip()}: must be above 0% and at most 100% of the original's bytes")
    return share


def percent(share: Fraction) -> str:
    """Return a share as people write it, such as ``25%``."""
    found = share * 100
    return f"{found if found.denominator == 1 else float(found)}%"


def read_fraction(text: str | float) -> Fraction:
    """Read ``25%``, ``0.25`` or ``1/4`` exactly.

    Raises:
        ValueError: not a number.
    """
    text = str(text).strip()
    # Fractions are exact: an exponent of many digits would be that many zeros.
    if not re.fullmatch(r"[^eE]{1,99}([eE][-+]?[0-9]{1,2})?%?", text):
        raise ValueError(text)
    try:
        return Fraction(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except ZeroDivisionError:
        raise ValueError(text) from None


def parse_bytes(text: str | float, flag: str = "--size") -> int:
    """Read a number of bytes; with a unit, fractions are allowed and rounded down.

    Raises:
        PlanError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].upper() not in UNITS:
        raise PlanError(
            f"{flag} {text}: not a size; write bytes, or a number with a unit, such as 12GB (10^9), 12G or 11GiB (2^30)"
            + (", or a share of the original's bytes, such as 60%" if flag == "--size" else "")
        )
    if not match[2] and "." in match[1]:
        guess = f"; did you mean {percent(Fraction(match[1]))}?" if 0 < Fraction(match[1]) <= 1 else ""
        raise PlanError(f"{flag} {text}: bytes are whole{guess}")
    return int(Fraction(match[1]) * UNITS[match[2].upper()])
