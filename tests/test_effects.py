"""What errors cost the predictions: the curve through two points, sums over layers, and what corrects them."""

import math

import pytest

from moetailor.calibration.effects import Effects, LayerEffects, Prices


def layer(constants: tuple[float, float], bits6: tuple[float, float], bits3: tuple[float, float]) -> LayerEffects:
    """Return effects of (nats, squared error)."""
    one, six, three = ({"kl": kl, "squared_error": error} for kl, error in (constants, bits6, bits3))
    return {"constants": one, "bits6": six, "bits3": three}


def measured(*layers: LayerEffects, together: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Effects:
    joint = dict(zip(("constants", "bits6", "bits3"), together, strict=True))
    return {"tokens": 10, "layers": dict(enumerate(layers)), "together": joint}


def test_both_measured_points_lie_on_the_curve() -> None:
    """In sums over ten tokens: kl = 0.5 e^2 + 0.25 e at e = 0.2 and at e = 2 a token."""
    six, three = (10 * (0.5 * e * e + 0.25 * e) for e in (0.2, 2.0))
    prices = Prices.of(measured(layer((30.0, 60.0), (six, 10 * 0.04), (three, 10 * 4.0))))
    assert prices.coarse[0] == pytest.approx(0.5)
    assert (prices.noise[0], prices.flips[0]) == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize(
    ("six", "three", "noise", "flips"),
    [
        ((0.4, 0.4), (40.0, 40.0), 1.0, 0.0),  # plain second order
        ((0.1, 0.4), (40.0, 40.0), 1.0, 0.0),  # it grows faster than that: the large errors say how much
        # It grows as e^.6, .2 and .8 nats at e = .2 and 2: by the line between 1 e and .4 e.
        ((2.0, 0.4), (8.0, 40.0), 0.0, math.sqrt(1.0 * 0.4)),
        ((0.0, 0.0), (0.0, 0.0), 0.0, 0.0),  # no errors
    ],
)
def test_neither_part_of_the_curve_is_below_zero(
    six: tuple[float, float], three: tuple[float, float], noise: float, flips: float
) -> None:
    prices = Prices.of(measured(layer((1.0, 1.0), six, three)))
    assert (prices.noise[0], prices.flips[0]) == pytest.approx((noise, flips))


def test_a_layer_whose_small_errors_cost_too_much_is_priced_by_the_others() -> None:
    """Errors of 1 e^2 + .5 e and, for the second layer, .2 e + .8 e^2 but for one token that costs 5 nats at e = .2."""

    def noisy(a: float, b: float, more: float = 0.0) -> LayerEffects:
        six, three = (10 * (a * e * e + b * e) for e in (0.2, 2.0))
        return layer((20.0, 10.0), (six + more, 10 * 0.04), (three, 10 * 4.0))

    prices = Prices.of(measured(noisy(1.0, 0.5), noisy(0.8, 0.2, more=5.0), noisy(1.2, 0.1)))
    assert (prices.noise[0], prices.flips[0]) == pytest.approx((1.0, 0.5))
    assert (prices.noise[2], prices.flips[2]) == pytest.approx((1.2, 0.1))
    # a is half of s in the middle of the layers, so 1; at e = 2 its errors cost 3.6 nats a token: less than that alone.
    assert (prices.noise[1], prices.flips[1]) == pytest.approx((0.9, 0.0))
    prices = Prices.of(measured(noisy(0.5, 0.5), noisy(0.8, 0.2, more=5.0), noisy(1.2, 0.1)))
    # With .5: what is left of 3.6 nats, 1.6, is the root of errors of 4.
    assert (prices.noise[1], prices.flips[1]) == pytest.approx((0.5, 0.8))


def two() -> Prices:
    return Prices(coarse={0: 1.0, 4: 2.0}, noise={0: 0.5, 4: 0.25}, flips={0: 3.0, 4: 1.0}, together=())


def test_the_sum_by_hand() -> None:
    errors = {0: (0.1, 0.2), 4: (0.0, 0.7)}
    # 1 x .1 + .5 x .2 + 2 x 0 + .25 x .7 + sqrt(9 x .3 + 1 x .7)
    assert two().sum(errors) == pytest.approx(0.375 + math.sqrt(3.4))
    assert two().moved(errors) == pytest.approx(math.sqrt(3.4))
    found = two().expected(errors)
    assert found == pytest.approx({0: 0.2 + 2.7 / math.sqrt(3.4), 4: 0.175 + 0.7 / math.sqrt(3.4)})
    assert sum(two().expected({0: (0.0, 0.0), 4: (0.0, 0.0)}).values()) == 0


def test_slopes_are_those_of_the_sum() -> None:
    errors, step = {0: (0.1, 0.2), 4: (0.0, 0.7)}, 1e-6
    moved = two().moved(errors)
    for index, (c, n) in errors.items():
        coarse, noise = two().slopes(index, moved)
        more = (two().sum(errors | {index: (c + step, n)}), two().sum(errors | {index: (c, n + step)}))
        assert [(after - two().sum(errors)) / step for after in more] == pytest.approx([coarse, noise], rel=1e-4)
    assert two().slopes(0, 0.0) == (1.0, 0.5)


def test_what_was_measured_of_all_layers_corrects_the_sum() -> None:
    """One layer of plain slopes: the sum says .01, .1 and 1 nat of what took .02, .1 and 4."""
    part = layer((10.0, 10.0), (0.1, 0.1), (1.0, 1.0))
    prices = Prices.of(measured(part, together=(40.0, 0.2, 1.0)))
    assert sum(prices.together, ()) == pytest.approx((0.01, 0.02, 0.1, 0.1, 1.0, 4.0))
    for error, wanted in ((0.01, 0.02), (0.1, 0.1), (1.0, 4.0), (0.001, 0.002), (3.0, 12.0)):
        assert prices.expected({0: (error, 0.0)})[0] == pytest.approx(wanted)
    # halfway in logarithms between factors 1 and 4
    half = 10**-0.5
    assert prices.expected({0: (half, 0.0)})[0] == pytest.approx(2 * half)
