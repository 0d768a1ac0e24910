"""planning/budget.py: what a user asks for becomes whole numbers, exactly."""

from fractions import Fraction

import pytest

from moetailor.errors import PlanError
from moetailor.planning.budget import Budget, parse_bytes, parse_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("25%", Fraction(1, 4)),
        (" 25 % ", Fraction(1, 4)),
        ("0.25", Fraction(1, 4)),
        (0.25, Fraction(1, 4)),
        ("1/3", Fraction(1, 3)),
        ("12.5%", Fraction(1, 8)),
        ("0", Fraction(0)),
        # As a float, 0.29 is a little less than 29/100; as text it is not.
        (0.29, Fraction(29, 100)),
    ],
)
def test_share_is_read_exactly(text: str | float, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["abc", "", "%", "25%%", "nan", "inf", "1/0", "1,5%"])
def test_text_that_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(PlanError) as refusal:
        parse_share(text)
    assert str(refusal.value) == f"--remove {text}: not a share; write 25% or 0.25"


def test_percent_without_its_sign_is_guessed() -> None:
    with pytest.raises(PlanError) as refusal:
        parse_share("25")
    assert str(refusal.value) == "--remove 25: must be at least 0% and below 100%; did you mean 25%?"


@pytest.mark.parametrize("text", ["100%", "150%", "-10%", "-0.1", "250"])
def test_share_out_of_range_is_refused_without_a_wrong_guess(text: str) -> None:
    with pytest.raises(PlanError) as refusal:
        parse_share(text)
    assert str(refusal.value).startswith(f"--remove {text}: must be at least 0% and below 100%")
    assert "did you mean" not in str(refusal.value)


@pytest.mark.parametrize(
    ("share", "experts", "kept"),
    [
        ("25%", 8, 6),
        ("50%", 7, 4),  # 3.5 are rounded to 3 that go
        ("29%", 100, 71),  # int(100 * 0.29) would be 28 that go
        ("1/3", 32, 22),
        ("0%", 5, 5),
        ("99%", 8, 1),
        ("12.5%", 64, 56),
        ("10%", 5, 5),
    ],
)
def test_experts_that_stay(share: str, experts: int, kept: int) -> None:
    assert Budget.parse(remove=share).kept(experts) == kept


def test_whole_percents_agree_with_whole_numbers() -> None:
    for experts in range(1, 130):
        for percent in range(100):
            kept = Budget.parse(remove=f"{percent}%").kept(experts)
            assert kept == experts - experts * percent // 100
            assert 1 <= kept <= experts
            assert kept == Budget.parse(remove=f"{percent}/100").kept(experts)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123456789", 123_456_789),
        (4096, 4096),
        ("12GB", 12_000_000_000),
        ("12 GiB", 12_884_901_888),
        ("12Gi", 12_884_901_888),
        ("24g", 24_000_000_000),
        ("1.5K", 1500),
        ("1.5kb", 1500),
        ("0.5KiB", 512),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("3MB", 3_000_000),
        ("3MiB", 3_145_728),
        ("100B", 100),
        ("1.0001KB", 1000),  # rounded down
        # A float of 2^53 and more could not hold it.
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_size_is_read_exactly(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "1e9", "1,000", "5 5", ".5GB", "12GX", -1])
def test_text_that_is_no_size_is_refused_with_the_units(text: str | int) -> None:
    with pytest.raises(PlanError) as refusal:
        parse_bytes(text)
    assert str(refusal.value) == (
        f"--size {text}: not a size; write bytes, or a number with a unit, such as 12GB (10^9), 12G or 11GiB (2^30), "
        "or a share of the original's bytes, such as 60%"
    )


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 0),
        ({"keep": 6, "remove": "25%"}, 2),
        ({"keep": 0, "size": "0"}, 2),
        ({"remove": "0%", "keep": 0, "size": "1GB"}, 3),
    ],
)
def test_exactly_one_budget_is_needed(given: dict, count: int) -> None:
    with pytest.raises(PlanError) as refusal:
        Budget.parse(**given)
    assert str(refusal.value) == f"{count} budgets given; give exactly one of --remove, --keep, --size and --memory"


@pytest.mark.parametrize("keep", [0, 9, -1])
def test_count_that_is_not_there_is_refused_with_the_range(keep: int) -> None:
    with pytest.raises(PlanError) as refusal:
        Budget.parse(keep=keep).kept(8)
    assert str(refusal.value) == f"--keep {keep}: the layers have 8 experts; keep 1 to 8"


@pytest.mark.parametrize("keep", [1, 8])
def test_both_ends_of_the_range_may_be_kept(keep: int) -> None:
    assert Budget.parse(keep=keep).kept(8) == keep


def test_size_decides_no_single_layer() -> None:
    with pytest.raises(PlanError, match="a budget in bytes says nothing about one layer"):
        Budget.parse(size="1GB").kept(8)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"remove": "25%"}, "remove 25%"),
        ({"remove": "12.5%"}, "remove 12.5%"),
        ({"keep": 48}, "keep 48"),
        ({"size": "12GB"}, "size 12000000000 bytes"),
    ],
)
def test_budget_reads_as_the_user_said_it(given: dict, text: str) -> None:
    assert str(Budget.parse(**given)) == text


def test_memory_as_stored_is_size() -> None:
    assert Budget.parse(memory="24GB").on_disk({}, {"BF16"}) == Budget(size=24 * 10**9)
    assert str(Budget.parse(memory="1kB", load_dtype="float16")) == "memory 1000 bytes in float16"


@pytest.mark.parametrize(
    ("dtypes", "experts", "load", "memory", "size"),
    [
        ({"F32": 400}, "F32", "bfloat16", 150, 300),  # 100 numbers of 2 bytes: 25 of them go, 4 bytes each
        ({"BF16": 200}, "BF16", "float32", 300, 150),  # 25 numbers go, 2 bytes each
        ({"BF16": 200, "F32": 40}, "BF16", "bfloat16", 200, 220),  # 220 bytes loaded: 20 go
        ({"BF16": 200, "I64": 80}, "BF16", "float16", 280, 280),  # whole numbers stay as they are
        ({"F32": 400}, "F32", "bfloat16", 151, 302),
        ({"F32": 400}, "F32", "bfloat16", 1000, 2000),
    ],
)
def test_memory_counts_numbers_in_the_dtype_they_are_loaded_in(
    dtypes: dict[str, int], experts: str, load: str, memory: int, size: int
) -> None:
    assert Budget.parse(memory=memory, load_dtype=load).on_disk(dtypes, {experts}).size == size


def test_what_cannot_be_loaded_in_another_dtype_is_refused() -> None:
    with pytest.raises(PlanError, match=r"experts are stored as F8_E4M3; leave it out"):
        Budget.parse(memory=10, load_dtype="bfloat16").on_disk({"F8_E4M3": 20}, {"F8_E4M3"})
    with pytest.raises(PlanError, match=r"--load-dtype int8\. Known: bfloat16, float16, float32"):
        Budget.parse(memory=10, load_dtype="int8")
    with pytest.raises(PlanError, match="says how --memory is counted"):
        Budget.parse(size=10, load_dtype="bfloat16")
    with pytest.raises(PlanError, match=r"^--memory 3 apples: not a size"):
        Budget.parse(memory="3 apples")


@pytest.mark.parametrize(
    ("text", "nbytes", "size"),
    [
        ("60%", 1000, 600),
        (" 60 % ", 1000, 600),
        ("100%", 7, 7),
        ("33.3%", 1000, 333),
        ("29%", 101, 29),  # 29.29, rounded down
        ("29%", 100, 29),  # in floats, 100 x 0.29 is a little less
    ],
)
def test_a_share_of_the_bytes_is_a_size_of_the_original(text: str, nbytes: int, size: int) -> None:
    assert Budget.parse(size=text).in_bytes(nbytes) == Budget(size=size)
    assert Budget.parse(size=size).in_bytes(nbytes) == Budget(size=size)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0%", "--size 0%: must be above 0% and at most 100% of the original's bytes"),
        ("101%", "--size 101%: must be above 0% and at most 100% of the original's bytes"),
        ("-5%", "--size -5%: must be above 0% and at most 100% of the original's bytes"),
        ("half%", "--size half%: not a share of the bytes; write 60%"),
        (0.6, "--size 0.6: bytes are whole; did you mean 60%?"),
        ("1.5", "--size 1.5: bytes are whole"),
    ],
)
def test_what_is_no_share_of_the_bytes_is_refused(text: str | float, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        Budget.parse(size=text)
    assert str(refusal.value) == said


def test_a_share_of_the_bytes_is_a_limit_like_others() -> None:
    assert str(Budget.parse(size="62.5%")) == "size 62.5%"
    with pytest.raises(PlanError, match="2 budgets given"):
        Budget.parse(size="60%", keep=4)
    with pytest.raises(PlanError, match="says nothing about one layer"):
        Budget.parse(size="60%").kept(8)
