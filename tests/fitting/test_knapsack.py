"""The knapsack of single choices, against every combination."""

import itertools

import pytest
import torch

from moetailor.errors import TooSmallError
from moetailor.fitting.knapsack import Shelf, cheapest


def shelf(items: int, seed: int, entries: int = 4) -> Shelf:
    """Return entries that cost less error the more bytes they take; the last two stay."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.randint(1, 40, (entries,), generator=generator).sort().values
    errors = torch.rand(items, entries, generator=generator).double().sort(dim=1, descending=True).values
    stays = torch.arange(entries) >= entries - 2
    return Shelf(errors=errors, nbytes=nbytes, stays=stays)


def best(shelves: list[Shelf], nbytes: int) -> float:
    """Return the least error of all combinations that fit."""
    every = [itertools.product(range(s.errors.shape[1]), repeat=len(s.errors)) for s in shelves]
    found = []
    for taken in itertools.product(*map(list, every)):
        fits = sum(int(s.nbytes[list(at)].sum()) for s, at in zip(shelves, taken, strict=True)) <= nbytes
        stays = all(bool(s.stays[list(at)].any()) for s, at in zip(shelves, taken, strict=True))
        if fits and stays:
            found.append(lost(shelves, taken))
    return min(found)


def lost(shelves: list[Shelf], taken: object) -> float:
    pairs = zip(shelves, taken, strict=True)  # type: ignore[call-overload]
    return sum(float(s.errors[item, at]) for s, each in pairs for item, at in enumerate(each))


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_is_much_better(seed: int) -> None:
    """By more than one item's share: at most one item is cut where entries may be mixed."""
    shelves = [shelf(3, 2 * seed), shelf(2, 2 * seed + 1)]
    least = sum(int(s.nbytes[0]) * (len(s.errors) - 1) + int(s.nbytes[-2]) for s in shelves)
    most = sum(int(s.nbytes[-1]) * len(s.errors) for s in shelves)
    for nbytes in range(least, most + 1, max((most - least) // 6, 1)):
        taken = cheapest(shelves, nbytes)
        assert sum(int(s.nbytes[at].sum()) for s, at in zip(shelves, taken, strict=True)) <= nbytes
        assert all(bool(s.stays[at].any()) for s, at in zip(shelves, taken, strict=True))
        assert lost(shelves, taken) <= best(shelves, nbytes) + 0.6
    assert cheapest(shelves, most) == [[3] * 3, [3] * 2]


def test_what_is_left_goes_where_it_saves_most() -> None:
    """Two items at 10 bytes or 20: with 30 only one gets more, the one that saves more; 29 are enough for neither."""
    errors = torch.tensor([[5.0, 1.0], [9.0, 2.0]], dtype=torch.float64)
    one = Shelf(errors=errors, nbytes=torch.tensor([10, 20]), stays=torch.tensor([True, True]))
    assert cheapest([one], 40) == [[1, 1]]
    assert cheapest([one], 30) == [[0, 1]]
    assert cheapest([one], 29) == [[0, 0]]


def test_one_of_a_group_stays() -> None:
    """Three items that lose least as stand-ins: the one that pays least for staying does, even for the last bytes."""
    errors = torch.tensor([[0.0, 0.3], [0.0, 0.1], [0.0, 0.2]], dtype=torch.float64)
    one = Shelf(errors=errors, nbytes=torch.tensor([1, 10]), stays=torch.tensor([False, True]))
    assert cheapest([one], 12) == [[0, 1, 0]]
    assert cheapest([one], 1000) == [[0, 1, 0]]


def test_entries_that_cannot_be_are_not_taken_and_of_equal_ones_the_smaller_is() -> None:
    errors = torch.tensor([[torch.inf, 0.0, 0.0], [torch.inf, 0.5, 0.0]], dtype=torch.float64)
    one = Shelf(errors=errors, nbytes=torch.tensor([1, 4, 9]), stays=torch.tensor([False, True, True]))
    assert cheapest([one], 13) == [[1, 2]]
    assert cheapest([one], 100) == [[1, 2]]
    assert cheapest([one], 8) == [[1, 1]]
    with pytest.raises(TooSmallError, match="get 7 bytes, the fewest that work take 8") as refused:
        cheapest([one], 7)
    assert refused.value.least == 8
