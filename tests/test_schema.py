"""Our JSON against its annotations: what fits comes back as it is, and the first value that does not is named."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import pytest

from moetailor.errors import CalibrationError, PlanError
from moetailor.schema import Count, Few, Within, load, load_json, read


@dataclass(frozen=True, kw_only=True)
class Part:
    kind: Literal["a", "b"]
    number: Few = 0
    ends: tuple[int, int] | None = None

    def __post_init__(self):
        if self.ends and self.ends[0] > self.ends[1]:
            raise ValueError(f"ends {self.ends} do not ascend")


class Row(TypedDict):
    name: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    layers: Mapping[int, Part] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    counts: dict[Few, int] = field(default_factory=dict)
    shares: Sequence[Annotated[float, Within(0, 1)]] = ()
    given: dict[str, int | float | str | bool] = field(default_factory=dict)
    nbytes: Count = 0
    anything: Any = None


GOOD = {
    "parts": [{"kind": "a"}, {"kind": "b", "number": 3, "ends": [1, 2]}],
    "layers": {"0": {"kind": "a"}, "12": {"kind": "b"}},
    "rows": [{"name": "x", "error": None}],
    "counts": {"0": 1, "65536": 2},
    "shares": [0, 0.5, 1],
    "given": {"a": 1, "b": 1.5, "c": "x", "d": True},
    "nbytes": 2**62,
    "anything": [None, {}],
}


def test_what_fits_is_made_as_annotated():
    made = read(Whole, GOOD, "x.json", error=PlanError, cure="plan again")
    assert made.parts == (Part(kind="a"), Part(kind="b", number=3, ends=(1, 2)))
    assert made.layers == {0: Part(kind="a"), 12: Part(kind="b")}
    assert made.counts == {0: 1, 65536: 2}
    assert made.rows == GOOD["rows"]
    assert [type(share) for share in made.shares] == [float] * 3
    assert [type(value) for value in made.given.values()] == [int, float, str, bool]
    again = json.loads(json.dumps(asdict(made)))
    assert read(Whole, again, "x.json", error=PlanError, cure="plan again") == made


WRONG = [
    ({"parts": 3}, "parts is 3, not a list"),
    ({"parts": [{"kind": "c"}]}, "parts[0].kind is 'c', not one of a, b"),
    ({"parts": [{"kind": 1}]}, "parts[0].kind is 1, not one of a, b"),
    ({"parts": [{"kind": "a"}, {}]}, "parts[1] lacks kind"),
    ({"parts": [{"kind": "a", "number": "x"}]}, "parts[0].number is 'x', not a whole number"),
    ({"parts": [{"kind": "a", "number": True}]}, "parts[0].number is True, not a whole number"),
    ({"parts": [{"kind": "a", "number": 1.0}]}, "parts[0].number is 1.0, not a whole number"),
    ({"parts": [{"kind": "a", "number": 10**9}]}, "parts[0].number is 1000000000, it must be 0 to 65536"),
    ({"parts": [{"kind": "a", "ends": [1]}]}, "parts[0].ends has 1 entries, it must have 2"),
    ({"parts": [{"kind": "a", "ends": "12"}]}, "parts[0].ends is '12', not a list"),
    ({"parts": [{"kind": "a", "ends": [2, 1]}]}, "parts[0] does not add up: ends (2, 1) do not ascend"),
    ({"parts": [{"kind": "a", "x": 1}]}, "parts[0] has the unknown keys ['x'], perhaps of another version"),
    ({"layers": {"x": {"kind": "a"}}}, "layers has the key 'x', not a whole number"),
    ({"layers": {"-1": {"kind": "a"}}}, "layers has the key '-1', not a whole number"),
    ({"layers": {"01": {"kind": "a"}}}, "layers has the key '01', not a whole number"),
    ({"layers": {"٣": {"kind": "a"}}}, "layers has the key '٣', not a whole number"),
    ({"counts": {"x": 1}}, "counts has the key 'x', not a whole number"),
    ({"counts": {"65537": 1}}, "counts is 65537, it must be 0 to 65536"),
    ({"layers": {"3": []}}, "layers['3'] is [], not an object"),
    ({"rows": [{"name": "x"}]}, "rows[0] lacks error"),
    ({"rows": [{"name": "\ud800", "error": None}]}, r"rows[0].name is '\ud800', not a text"),
    ({"shares": [0.5, 1.5]}, "shares[1] is 1.5, it must be 0 to 1"),
    ({"shares": [float("nan")]}, "shares[0] is nan, not a finite number"),
    ({"shares": [float("inf")]}, "shares[0] is inf, not a finite number"),
    ({"shares": [10**400]}, "not a finite number"),
    ({"shares": [False]}, "shares[0] is False, not a finite number"),
    ({"given": {"a": None}}, "not a whole number or a finite number or a text or true or false"),
    ({"nbytes": -1}, "nbytes is -1, it must be 0 or more"),
    ({"nbytes": 2**63}, "nbytes is 9223372036854775808, not a whole number"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_the_first_value_that_does_not_fit_is_named(change, said):
    with pytest.raises(PlanError) as refused:
        read(Whole, GOOD | change, "x.json", error=PlanError, cure="plan again")
    message = str(refused.value)
    assert message.startswith("x.json: ")
    assert said in message
    assert message.endswith("; plan again")
    assert len(message) < 200


def test_what_is_no_object_is_refused_as_a_whole():
    with pytest.raises(CalibrationError, match=r"^x: it is \[\], not an object; do$"):
        read(Whole, [], "x", error=CalibrationError, cure="do")


FILES = {
    "empty": (b"", "not JSON that can be read"),
    "cut off": (b'{"a": ', "not JSON that can be read"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "not JSON that can be read"),
    "deep": (b'{"a": ' + b"[" * 100_000, "not JSON that can be read"),
    "many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "a list": (b"[]", "not a JSON object"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_object_is_refused(case, tmp_path):
    content, said = FILES[case]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(PlanError) as refused:
        load_json(tmp_path / "x.json", error=PlanError, cure="plan again")
    assert str(refused.value).startswith(f"{tmp_path / 'x.json'}: {said}")
    assert str(refused.value).endswith("; plan again")


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    for name, said in (
        ("pipe", "no ordinary file"),
        ("sparse", "more than"),
        ("none", "No such file"),
        (".", "no ord"),
    ):
        with pytest.raises(PlanError, match=said):
            load_json(tmp_path / name, error=PlanError, cure="plan again")


def test_format_and_version_are_checked_first(tmp_path):
    def given(**content):
        (tmp_path / "x.json").write_text(json.dumps(content))
        return load(Whole, tmp_path / "x.json", "plan", 1, error=PlanError, cure="plan again")

    assert given(format="moetailor-plan", version=1, parts=[]) == Whole(parts=())
    with pytest.raises(PlanError, match=r"x\.json: not a moetailor plan; plan again"):
        given(format="other", version=1, parts=3)
    for version in (2, True, None, "1", 1.0):
        with pytest.raises(PlanError, match=f"a plan of version {version!r}, this moetailor reads 1; plan again"):
            given(format="moetailor-plan", version=version, parts=3)
