"""What options promise: whose epsilon is said, which noise an epsilon asks for, what is refused."""

import math
import warnings

import pytest

from d2ft_fl.aggregation import privacy
from d2ft_fl.aggregation.privacy import Privacy, noise_for
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from tests.aggregation.test_privacy import PRIVATE


class Accountant:
    """Says an epsilon, and keeps what it was asked."""

    def __init__(self, epsilon):
        self.epsilon, self.history, self.asked = epsilon, None, []

    def get_epsilon(self, delta):
        self.asked.append((self.history, delta))
        return self.epsilon


@pytest.fixture
def accountants(monkeypatch):
    """Puts two accountants, of a loose and of a tight bound, in place of Opacus's."""

    def put(loose, tight):
        both = Accountant(loose), Accountant(tight)
        monkeypatch.setattr(privacy, "_accountants", lambda: both)
        return both

    privacy._epsilon.cache_clear()
    yield put
    privacy._epsilon.cache_clear()


@pytest.mark.parametrize(
    "loose,tight,said", [(99.9, 5.0, 5.0), (99.9, 200.0, 99.9), (100.0, 5.0, 100.0), (7, 7.5, 7)]
)
def test_the_tight_bound_is_asked_for_where_the_loose_is_below_100(accountants, loose, tight, said):
    of_orders, of_losses = accountants(loose, tight)
    assert Privacy(3.0, 2.0, 0.25, 1e-4).epsilon([1, 4, 0, 1, 4, 4]) == said
    # Two rounds with noise 2, three that were released four times with noise 2 / sqrt(4).
    asked = [([(2.0, 0.25, 2), (1.0, 0.25, 3)], 1e-4)]
    assert of_orders.asked == asked
    assert of_losses.asked == (asked if loose < 100 else [])


def test_without_releases_nobody_is_asked(accountants):
    both = accountants(5.0, 5.0)
    assert Privacy(3.0, 2.0, 0.25, 1e-4).epsilon([0, 0]) == 0
    assert both[0].asked == both[1].asked == []


def test_warnings_of_accountants_are_not_passed_on():
    privacy._epsilon.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Opacus has one of its orders here
        assert Privacy(1.0, 200.0, 0.01, 1e-5).epsilon([1]) < 0.1


# -- the noise that an epsilon asks for ----------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The noises that are tried, where epsilon is 1 over the noise."""
    found = []

    def cost(history, delta):
        ((noise, rate, rounds),) = history
        assert (rate, rounds, delta) == (0.25, 3, 1e-4)
        found.append(noise)
        assert len(found) < 100  # halving ends
        return 1 / noise

    monkeypatch.setattr(privacy, "_epsilon", cost)
    noise_for.cache_clear()
    yield found
    noise_for.cache_clear()


def test_noise_is_doubled_until_it_is_enough_then_halved_between(asked):
    assert noise_for(0.3, 1e-4, 0.25, 3) == 3.333984375  # the least is 10/3
    assert asked == [
        1, 2, 4, 3, 3.5, 3.25, 3.375, 3.3125, 3.34375, 3.328125, 3.3359375, 3.33203125, 3.333984375,
    ]  # fmt: skip


def test_noise_that_keeps_an_epsilon_exactly_is_enough(asked):
    assert noise_for(0.25, 1e-4, 0.25, 3) == 4
    assert asked[:4] == [1, 2, 4, 3]
    assert noise_for(1 / 3.5, 1e-4, 0.25, 3) == 3.5


def test_noise_is_known_to_a_thousandth_once_the_ends_are_as_near(asked):
    """999/512 is too little, and 1000/512, a thousandth more, is enough."""
    assert noise_for(1 / 1.9515, 1e-4, 0.25, 3) == 1000 / 512


def test_the_least_noise_is_looked_for_above_a_hundredth(asked):
    assert 0.1 <= noise_for(10.0, 1e-4, 0.25, 3) <= 0.1001
    assert asked[:2] == [1, (0.01 + 1) / 2]


def test_no_more_noise_than_two_to_the_20_is_tried(asked):
    with pytest.raises(ConfigError, match=r"epsilon = 1e-09 cannot be kept with delta = 0\.0001"):
        noise_for(1e-9, 1e-4, 0.25, 3)
    assert asked == [2**k for k in range(21)]


# -- options -------------------------------------------------------------------------------------


def promised(measured=(), **options):
    entries = {**PRIVATE, "clients": 8, "rounds": 3, **options}
    return Privacy.of(RunConfig.from_mapping(entries), measured)


def test_what_is_promised_by_noise_and_by_epsilon(asked):
    options = {"clip-norm": 3.0, "sample-clients": 2, "delta": 1e-4}
    noise = promised(**{**options, "noise-multiplier": 0.75})
    assert noise == Privacy(clip=3.0, noise=0.75, rate=0.25, delta=1e-4, most=math.inf)
    by_epsilon = promised(**{**options, "noise-multiplier": 0.0, "epsilon": 4.0})
    least = noise_for(4.0, 1e-4, 0.25, 3)
    assert by_epsilon == Privacy(clip=3.0, noise=least, rate=0.25, delta=1e-4, most=4.0)
    assert 0.25 <= least <= 0.2503
    assert promised(**{"noise-multiplier": 0.0, "epsilon": 0.0}) is None


@pytest.mark.parametrize("delta,fits", [(0.124, True), (0.125, False), (0.2, False), (0.0, False)])
def test_delta_is_below_one_over_the_clients(delta, fits):
    if fits:
        assert promised(delta=delta).delta == delta
        return
    with pytest.raises(ConfigError, match=r"above 0, and below 1 / clients = 0\.125"):
        promised(delta=delta)


@pytest.mark.parametrize("noise,fits", [(0.01, True), (0.009, False), (1.0, True)])
def test_noise_is_a_hundredth_of_clip_norm_at_least(noise, fits):
    if fits:
        assert promised(**{"noise-multiplier": noise}).noise == noise
        return
    with pytest.raises(ConfigError, match=r"promises nothing: set it to 0\.01 or more"):
        promised(**{"noise-multiplier": noise})


def test_what_is_measured_on_data_is_named():
    with pytest.raises(ConfigError, match=r"^fisher and taylor scores are measured on clients'"):
        promised(("fisher", "taylor"))
