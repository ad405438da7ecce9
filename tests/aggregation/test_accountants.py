"""The reported epsilon beside two accountants that share nothing with it but the mechanism.

Both are written from definitions, with numerical integration alone: Rényi differential privacy of
sampled normal noise (Mironov, Talwar & Zhang 2019, arXiv 1908.10530), turned into epsilon as by
Canonne, Kamath & Steinke (NeurIPS 2020), and the law of the privacy loss, rounded up and rounded
down to a grid and convolved with itself, which encloses the exact epsilon.

One client's whole change is 1 long (the clip norm), noise has deviation z, q is the chance of a
draw.
"""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from d2ft_fl.aggregation.privacy import Privacy

# Opacus is asked for epsilon with an error of 0.01, and says the upper end.
TOLERANCE = 0.02
CASES = [(1.0, 0.1, 10, 1e-5), (0.7, 0.02, 200, 1e-5), (4.0, 1.0, 20, 1e-6), (1.5, 0.5, 3, 1e-3)]


def renyi_epsilon(z, q, rounds, delta):
    """An upper bound: the best of many orders, each integrated over what the server sends."""
    x = np.linspace(-40 * z, 40 * z + 120, 40_001)
    step = math.log(x[1] - x[0])
    ratio = np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + (x - 0.5) / z**2)
    best = math.inf
    for order in [1 + 1.15**k / 20 for k in range(50)]:
        moments = [
            logsumexp(norm.logpdf(x, scale=z) + power * ratio) + step
            for power in (order, 1 - order)  # one more client, one fewer
        ]
        cost = rounds * max(moments) / (order - 1)
        best = min(
            best, cost + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        )
    return best


def loss_law(z, q, more, up, width, size):
    """Privacy loss of one round as probabilities on a grid [size], and of an endless loss.

    Args:
        more: Whether the client is in the federation that the loss is seen from.
        up: Whether losses are rounded up, or down.
    """
    edges = (np.arange(size + 1) - size // 2) * width  # cell k lies between edges k and k + 1
    loss = edges if more else -edges
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = (np.exp(loss) - (1 - q)) / q
        x = np.where(inner > 0, z**2 * np.log(inner) + 0.5, -np.inf)
    below = q * norm.cdf((x - 1) / z) + (1 - q) * norm.cdf(x / z) if more else norm.sf(x / z)
    law = np.roll(np.diff(below), int(up))
    return law, (1 - below[-1] if up else 0.0) + (below[0] if up else 0.0)


def loss_epsilon(z, q, rounds, delta, up):
    """An upper or a lower bound of the exact epsilon."""
    width, size = 1e-3, 2**17  # losses up to 65
    found = 0.0
    for more in (True, False):
        law, endless = loss_law(z, q, more, up, width, size)
        spectrum = np.fft.rfft(np.fft.ifftshift(law))
        total = np.fft.fftshift(np.fft.irfft(spectrum**rounds, size))
        losses = (np.arange(size) - size // 2) * width
        beyond = 1 - (1 - endless) ** rounds

        def excess(epsilon, total=total, losses=losses, beyond=beyond):
            over = losses > epsilon
            return beyond - delta + (total[over] * -np.expm1(epsilon - losses[over])).sum()

        found = max(found, brentq(excess, 0, 60))
    return found


@pytest.mark.parametrize("z,q,rounds,delta", CASES)
def test_epsilon_is_what_two_other_accountants_say(z, q, rounds, delta):
    reported = Privacy(1.0, z, q, delta).epsilon([1] * rounds)
    low, high = (loss_epsilon(z, q, rounds, delta, up) for up in (False, True))
    loose = renyi_epsilon(z, q, rounds, delta)
    assert low <= high <= loose
    assert low - 1e-3 <= reported <= high + TOLERANCE
    assert reported <= loose <= 1.25 * reported  # what order alone can tell


def test_epsilon_that_promises_little_is_the_looser_accountants():
    """Beyond 100 the tight accountant is not asked."""
    reported = Privacy(1.0, 0.2, 0.5, 1e-5).epsilon([1] * 20)
    assert reported > 100
    assert 1 <= reported / renyi_epsilon(0.2, 0.5, 20, 1e-5) <= 1.03  # of fewer orders


def test_two_releases_of_one_draw_cost_what_both_together_tell():
    """Integrated over the plane of both noisy sums, for a round that was released twice."""
    z, q, delta = 1.2, 0.2, 1e-4
    x = np.linspace(-10, 12, 801)
    cell = (x[1] - x[0]) ** 2
    without = np.outer(norm.pdf(x, 0, z), norm.pdf(x, 0, z))
    with_one = q * np.outer(norm.pdf(x, 1, z), norm.pdf(x, 1, z)) + (1 - q) * without

    def excess(epsilon):
        pairs = ((with_one, without), (without, with_one))
        return max(np.maximum(a - math.exp(epsilon) * b, 0).sum() * cell for a, b in pairs) - delta

    exact = brentq(excess, 0, 20)
    own = Privacy(1.0, z, q, delta)
    assert exact - 1e-3 <= own.epsilon([2]) <= exact + TOLERANCE
    # Two draws would tell less; taking one for the other would promise too much.
    assert own.epsilon([1, 1]) < exact - 0.1


def test_releases_of_several_rounds_compose():
    """Without sampling, n noisy sums are one with n times less variance."""
    own = Privacy(1.0, 5.0, 1.0, 1e-5)
    mu = math.sqrt(1 + 1 + 2 + 3) / 5.0

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - 1e-5

    exact = brentq(excess, 0, 100)
    assert exact - 1e-3 <= own.epsilon([1, 2, 1, 3, 0]) <= exact + TOLERANCE
