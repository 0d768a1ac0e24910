"""How experts in few bits lie: the storage of each of their matrices, and the names of their tensors."""

from __future__ import annotations

from moetailor_vllm.lookups import CODE_WEIGHTS, FLOATS
from moetailor_vllm.slots import Packed


def storages(width: Packed) -> dict[str, str]:
    """Return how each matrix of an expert in few bits lies.

    Raises:
        NotImplementedError: as numbers beside the codes of a quantized original, or in a way that is not known here.
    """
    if width.bits > 8:
        raise NotImplementedError("moetailor-vllm does not serve experts beside the codes of a quantized original")
    if width.codes not in ("uint", "int", "vq", *FLOATS):
        raise NotImplementedError(
            f"moetailor-vllm does not serve experts in {width.codes}; a newer one may, or transformers"
        )
    down = width.down or width.bits

    def storage(bits: int) -> str:
        if width.codes in FLOATS:
            return width.codes
        codes = "uint" if width.codes == "vq" and bits not in CODE_WEIGHTS else width.codes
        return f"{codes}{bits}g{width.group}"

    return {"gate": storage(width.bits), "up": storage(width.bits), "down": storage(down)}


def stem(width: Packed) -> str:
    """Return the start of the names of the tensors of a width."""
    bits = f"{width.codes}{width.bits}_{width.down or width.bits}_g{width.group}"
    return f"packed_{width.codes if width.codes in FLOATS else bits}"
