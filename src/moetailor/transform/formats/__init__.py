"""The forms in which a result is written: one file for each, registered by being imported here."""

from moetailor.transform.formats.format import FORMATS, Finish, Format, find_format, resolve_format

from moetailor.transform.formats.native import Native  # isort: skip (the order in which `auto` tries them)
from moetailor.transform.formats.moetailor import Moetailor  # isort: skip
from moetailor.transform.formats.compressed_tensors import CompressedTensors  # isort: skip
from moetailor.transform.formats.gguf import Gguf  # isort: skip
from moetailor.transform.formats.expanded import Expanded  # isort: skip
from moetailor.transform.formats.vllm_mone import VllmMone  # isort: skip

__all__ = [
    "FORMATS",
    "CompressedTensors",
    "Expanded",
    "Finish",
    "Format",
    "Gguf",
    "Moetailor",
    "Native",
    "VllmMone",
    "find_format",
    "resolve_format",
]
