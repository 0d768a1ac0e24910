"""Our own JSON, read as what the annotations of a dataclass or TypedDict say, and refused where it says otherwise.

The annotations are the whole schema: int, float, str, bool, None, Literal, unions, list, tuple, dict, Sequence,
Mapping, dataclasses, TypedDicts, Any, and bounds of a number as in ``Annotated[int, Within(0, 8)]``. Numbers are finite
and fit 64 bits, keys that are not annotated are refused. What types cannot say a dataclass checks itself: its
``__post_init__`` raises ValueError or MoetailorError.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from moetailor.errors import MoetailorError

T = TypeVar("T")
WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    dict: "an object",
}
# Bytes of a JSON file; ours are far smaller, and larger ones would fill memory.
LARGEST = 2**28


@dataclass(frozen=True)
class Within:
    """The bounds of a number, both included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low} or more" if self.high == math.inf else f"{self.low} to {self.high}"


Count = Annotated[int, Within(0)]
# Of what loops run over: experts, slots, decoder layers.
Few = Annotated[int, Within(0, 2**16)]


def load(kind: type[T], file: str | Path, name: str, version: int, *, error: type[MoetailorError], cure: str) -> T:
    """Read a file that says what it is: ``{"format": "moetailor-plan", "version": 1, ...}``.

    Args:
        kind: what else is in it, a dataclass or TypedDict.
        file: the file.
        name: what it is, such as ``plan``.
        version: the version that is read.
        error: what is raised.
        cure: what to do about a file that cannot be read: the end of the message.

    Raises:
        MoetailorError: of the given class: the file cannot be read, is something else, or a value does not fit.
    """
    content = load_json(file, error=error, cure=cure)
    if content.pop("format", None) != f"moetailor-{name}":
        raise error(f"{file}: not a moetailor {name}; {cure}")
    if (found := content.pop("version", None)) != version or type(found) is not int:
        raise error(f"{file}: a {name} of version {reprlib.repr(found)}, this moetailor reads {version}; {cure}")
    content.pop("settings", None)  # for people: what the command line was given
    return read(kind, content, str(file), error=error, cure=cure)


def load_json(file: str | Path, *, error: type[MoetailorError], cure: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; see `load`."""
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no ordinary file")
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{size:,} bytes, more than {LARGEST:,}")
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except OSError as reason:
        raise error(f"{file}: cannot be read ({reason.strerror}); {cure}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{file}: not JSON that can be read ({reason}); {cure}") from None
    if not isinstance(content, dict):
        raise error(f"{file}: not a JSON object; {cure}")
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict:
    """Return a JSON object of its pairs; a key that comes twice is an error, for readers differ on which one counts.

    Raises:
        ValueError: see above.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} comes twice")
    return found


def find_json(file: str | Path, *, error: type[MoetailorError], cure: str) -> dict[str, Any] | None:
    """Read a file that holds one JSON object, if it is there; see `load`."""
    return load_json(file, error=error, cure=cure) if Path(file).exists() else None


def read(kind: type[T], value: Any, where: str, *, error: type[MoetailorError], cure: str) -> T:
    """Return a JSON value as what a type says, dataclasses made; see `load`.

    Args:
        kind: the type.
        value: what `json.loads` gave.
        where: what it was read from: the begin of the message.
        error: what is raised.
        cure: what to do: the end of the message.
    """
    try:
        return _read(kind, value, "")
    except _MisfitError as misfit:
        raise error(f"{where}: {misfit}; {cure}") from None


class _MisfitError(Exception):
    """A value that is not what its place asks for."""

    def __init__(self, at: str, said: str) -> None:
        super().__init__(f"{at.removeprefix('.') or 'it'} {said}")


def _read(kind: Any, value: Any, at: str) -> Any:
    origin, given = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return value
    if origin is Annotated:
        number = _read(given[0], value, at)
        if outside := [bounds for bounds in given[1:] if not bounds.low <= number <= bounds.high]:
            raise _MisfitError(at, f"is {reprlib.repr(value)}, it must be {outside[0]}")
        return number
    if origin in (Union, UnionType):
        return _read_union(given, value, at)
    if origin is Literal:
        if not any(type(value) is type(word) and value == word for word in given):
            raise _MisfitError(at, f"is {reprlib.repr(value)}, not one of {', '.join(map(str, given))}")
        return value
    if is_dataclass(origin) or is_typeddict(origin):
        return _read_fields(origin, _plain(dict, value, at), at)
    if origin in (list, tuple, Sequence):
        return _read_list(origin, given, _plain(list, value, at), at)
    if origin in (dict, Mapping):
        return {
            _key(name, at, *given[:1]): _read(given[1] if given else Any, one, f"{at}[{reprlib.repr(name)}]")
            for name, one in _plain(dict, value, at).items()
        }
    return _plain(origin, value, at)


def _read_union(kinds: Sequence[Any], value: Any, at: str) -> Any:
    """Read as the first kind that fits; where one alone is left beside null, its own message says more."""
    kinds = [kind for kind in kinds if kind is not NoneType or value is None]
    if len(kinds) == 1:
        return _read(kinds[0], value, at)
    for kind in kinds:
        try:
            return _read(kind, value, at)
        except _MisfitError:
            continue
    words = " or ".join(WORDS.get(kind, str(kind)) for kind in kinds)
    raise _MisfitError(at, f"is {reprlib.repr(value)}, not {words}")


def _read_list(origin: Any, kinds: Sequence[Any], values: list, at: str) -> Any:
    if origin is tuple and kinds[-1] is not ...:
        if len(values) != len(kinds):
            raise _MisfitError(at, f"has {len(values)} entries, it must have {len(kinds)}")
    else:
        kinds = [kinds[0] if kinds else Any] * len(values)
    found = [_read(kind, one, f"{at}[{n}]") for n, (kind, one) in enumerate(zip(kinds, values, strict=True))]
    return tuple(found) if origin is tuple else found


def _read_fields(kind: Any, value: dict, at: str) -> Any:
    hints, needed = _schema(kind)
    if unknown := value.keys() - hints.keys():
        raise _MisfitError(at, f"has the unknown keys {sorted(unknown)}, perhaps of another version of moetailor")
    if missing := needed - value.keys():
        raise _MisfitError(at, f"lacks {', '.join(sorted(missing))}")
    found = {name: _read(hints[name], one, f"{at}.{name}") for name, one in value.items()}
    try:
        return kind(**found)
    except (ValueError, MoetailorError) as reason:
        raise _MisfitError(at, f"does not add up: {reason}") from None


@cache
def _schema(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the type of each key of a dataclass or TypedDict, and the keys that must be there."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return hints, kind.__required_keys__
    made = [field for field in fields(kind) if field.init]
    needed = (field.name for field in made if field.default is MISSING and field.default_factory is MISSING)
    return {field.name: hints[field.name] for field in made}, frozenset(needed)


def _plain(kind: Any, value: Any, at: str) -> Any:
    """Return a value of a plain type; whole numbers pass for numbers, true and false do not."""
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    fits = type(value) is kind
    if fits and kind is int:
        fits = abs(value) < 2**63
    elif fits and kind is float:
        fits = math.isfinite(value)
    elif fits and kind is str:
        fits = re.search("[\ud800-\udc7f\udd00-\udfff]", str(value)) is None  # halves of characters
    if not fits:
        raise _MisfitError(at, f"is {reprlib.repr(value)}, not {WORDS[kind]}")
    return value


def _key(name: str, at: str, kind: Any = str) -> Any:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if plain is int and not re.fullmatch("0|[1-9][0-9]{0,8}", name):
        raise _MisfitError(at, f"has the key {reprlib.repr(name)}, not a whole number")
    return _read(kind, plain(name), at)
