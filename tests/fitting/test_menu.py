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
