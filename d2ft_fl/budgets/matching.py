"""Give every strategy the same mean budget, so that they can be compared.

Of the budgets that clients report, one resource stays and is scaled; the others are dropped. With
s_c the share of training everything that client c's budget affords (1 without one), each gets

    min(1, k s_c)        with k such that their mean is the configured share,

so that who has more than whom stays as it was. Where, after the first round, clients with no budget
at all leave no mean that high, the highest there is is taken. For seconds there is one deadline for
all: that share of the mean time that training everything takes clients by their speed and
bandwidths.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from d2ft_fl.budgets.budget import DEADLINE, Amount, Budget
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ConfigError

# What is matched, and the budgets that are.
MATCHES = {
    "flops": ("flops",),
    "bytes": ("bytes_up", "bytes_down"),
    "memory": ("memory",),
    "seconds": (DEADLINE,),
}


def matched(
    kind: str,
    share: float,
    budgets: Sequence[Budget],
    full: Sequence[Cost],
    within_reach: bool = False,
) -> list[Budget]:
    """Return clients' budgets of one kind alone, with the configured mean.

    Args:
        kind: One of :data:`MATCHES`.
        share: The mean, as a share of training everything; 0 for the mean that they have.
        budgets: As clients report them.
        full: What training everything costs each client.
        within_reach: Take the highest mean there is where clients with no budget at all leave none
            as high as the configured one, and the mean of the deadlines that there are.

    Raises:
        ConfigError: When there is no such mean.
    """
    bare = [
        replace(b, flops=None, memory=None, bytes_up=None, bytes_down=None, deadline=None)
        for b in budgets
    ]
    if kind == "seconds":
        deadline = _deadline(share, budgets, full, within_reach)
        return [replace(b, deadline=deadline) for b in bare]
    for resource in MATCHES[kind]:
        shares = _scaled(resource, share, budgets, full, within_reach)
        amounts = [Amount(value, relative=True) for value in shares.tolist()]
        bare = [_limited(b, resource, a) for b, a in zip(bare, amounts, strict=True)]
    return bare


def _limited(budget: Budget, resource: str, amount: Amount) -> Budget:
    limit: dict[str, Any] = {resource: amount}
    return replace(budget, **limit)


def _scaled(
    resource: str,
    share: float,
    budgets: Sequence[Budget],
    full: Sequence[Cost],
    within_reach: bool,
) -> np.ndarray:
    """Return clients' shares of one resource, scaled to the mean: float64 [clients]."""
    reported = np.array(
        [
            _share(b.limit(resource), getattr(f, resource))
            for b, f in zip(budgets, full, strict=True)
        ]
    )
    target, reach = share or float(reported.mean()), float((reported > 0).mean())
    if within_reach:
        target = min(target, reach)
    if target > reach:
        raise ConfigError(
            f"match-share = {target:g} cannot be reached: {int((reported == 0).sum())} of "
            f"{len(reported)} clients have a budget of no {resource.replace('_', ' ')} at all"
        )
    # mean(min(1, k s)) grows with k; it is linear between the values at which a client reaches 1.
    ordered = np.sort(reported[reported > 0])[::-1]
    whole = np.arange(len(ordered))  # clients at 1
    rest = np.cumsum(ordered[::-1])[::-1]  # what the others have
    factors = (target * len(reported) - whole) / rest
    fits = factors * ordered <= 1
    factor = factors[fits.argmax()] if fits.any() else np.inf
    with np.errstate(invalid="ignore"):
        return np.where(reported > 0, np.minimum(1.0, factor * reported), 0.0)


def _share(amount: Amount | None, full: int) -> float:
    """Return an amount as a share of what training everything costs, at most 1."""
    if amount is None or not full:
        return 1.0
    return min(1.0, amount.value if amount.relative else amount.value / full)


def _deadline(
    share: float, budgets: Sequence[Budget], full: Sequence[Cost], within_reach: bool
) -> float:
    """Return the deadline of all clients, in seconds."""
    if not share:
        deadlines = [b.deadline for b in budgets if b.deadline is not None]
        if len(deadlines) < (1 if within_reach else len(budgets)):
            raise ConfigError(
                "match = 'seconds' without match-share needs a deadline of every client: set "
                "match-share, or name deadlines in budgets"
            )
        return float(np.mean(deadlines))
    seconds = [b.seconds(cost) for b, cost in zip(budgets, full, strict=True)]
    if not any(seconds):
        raise ConfigError(
            "match = 'seconds' needs clients that take time: budgets with speed or bandwidths"
        )
    return share * float(np.mean(seconds))
