"""The knapsack over the slots of several layers, against all choices."""

import itertools

import pytest
import torch

from moetailor.fitting.menu import Menu, cheapest


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_is_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    menus = [
        Menu(
            errors=torch.rand(3, 2, generator=generator).double(),
            price=[1, 4],
            expert_nbytes=10,
            must_keep=[1] if seed else [],
        ),
        Menu(errors=torch.rand(2, 3, generator=generator).double(), price=[0, 2, 5], expert_nbytes=8),
    ]

    def cost(choice: list[list[int]]) -> float:
        return sum(
            float(menu.errors[expert, at])
            for menu, taken in zip(menus, choice, strict=True)
            for expert, at in enumerate(taken)
            if at < len(menu.price)
        )

    def fits(choice: list[list[int]]) -> bool:
        prices = [[*menu.price, menu.expert_nbytes] for menu in menus]
        total = sum(price[at] for price, taken in zip(prices, choice, strict=True) for at in taken)
        whole = all(len(menu.price) in taken for menu, taken in zip(menus, choice, strict=True))
        kept = all(
            taken[e] == len(menu.price) for menu, taken in zip(menus, choice, strict=True) for e in menu.must_keep
        )
        return total <= 32 and whole and kept

    firsts, seconds = itertools.product(range(3), repeat=3), list(itertools.product(range(4), repeat=2))
    every = ([list(first), list(second)] for first in firsts for second in seconds)
    best = min(cost(choice) for choice in every if fits(choice))
    found = cheapest(menus, 32)
    assert fits(found)
    assert cost(found) <= best * 1.001 + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_an_expert_that_stays_in_an_entry_is_there_for_the_others(seed: int) -> None:
    """Entry 0 is cheap and keeps the expert, entry 1 is free and needs another one to stay."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(3, 2, generator=generator).double()
    requires = torch.tensor([[-1, 1], [-1, 2], [-1, 0]])
    menu = Menu(errors=errors, price=[2, 0], expert_nbytes=9, requires=requires, keeping=[0])

    def fits(taken: tuple[int, ...]) -> bool:
        needed = [int(requires[expert, at]) for expert, at in enumerate(taken) if at == 1]
        return (
            sum((2, 0, 9)[at] for at in taken) <= 6
            and 0 < sum(at != 1 for at in taken)
            and 1 not in {taken[other] for other in needed}
        )

    def cost(taken: tuple[int, ...] | list[int]) -> float:
        return sum(float(errors[expert, at]) for expert, at in enumerate(taken) if at < 2)

    best = min(cost(taken) for taken in itertools.product(range(3), repeat=3) if fits(taken))
    (found,) = cheapest([menu], 6)
    assert fits(tuple(found))
    assert cost(found) == pytest.approx(best, rel=1e-3)
