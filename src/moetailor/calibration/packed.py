"""Packed files, opened as what is in them: gzip, and Zstandard through pyarrow, which datasets brings."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from moetailor.errors import CalibrationError

DATASETS_HINT = "reading it needs the datasets library: pip install 'moetailor[datasets]'"
PACKED = (".gz", ".zst")


def opened(path: Path) -> Any:
    """Open a file for reading bytes, unpacked where its name says that it is packed.

    Raises:
        CalibrationError: it needs a library that is not there.
    """
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_Zstandard(path)) if path.suffix.lower() == ".zst" else open(path, "rb")


class _Zstandard(io.RawIOBase):
    """A file in Zstandard that knows where it stands, as pyarrow's does not."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
        except ImportError:
            raise CalibrationError(f"{path}: {DATASETS_HINT}") from None
        self._stream: BinaryIO = pyarrow.input_stream(str(path), compression="zstd")
        self._at = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what comes next into a buffer, and return how many bytes these are."""
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._at

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._stream.close()
        super().close()
