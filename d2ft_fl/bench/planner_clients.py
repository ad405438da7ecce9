"""Made-up clients for ``d2ft bench planner``.

Clients come from three families of costs in equal parts: memory falls with depth; hierarchical, in
four stages of which each has four times the weights and half the memory of the one before; and
costs that differ from client to client. Budgets are uniform between 3 % and 90 % of everything
FULL, each of the four independently; blocks charge for being opened.
"""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.planning.problem import Structure

STAGES = 4
UNIT = 100_000  # integers per unit of cost


@dataclass(frozen=True, eq=False)
class Clients:
    """Made-up clients, as :func:`~d2ft_fl.planning.knapsack.solve` takes them.

    C clients, T tables of costs, I subnets, K options, G blocks, M openings of a block.

    Attributes:
        train: float64 [I], value of training a subnet.
        rest: float64 [1, I, K], value of all that an option does besides training.
        share: float64 [K], how far an option trains.
        costs: int64 [T, I, K, 4], costs of options by resource.
        capacities: int64 [C, 4], budgets of clients.
        tables: int64 [C], the table of each client.
        structure: Blocks, openings and cases.
        family: int64 [C], 0 where memory falls with depth, 1 hierarchical, 2 different in each.
    """

    train: np.ndarray
    rest: np.ndarray
    share: np.ndarray
    costs: np.ndarray
    capacities: np.ndarray
    tables: np.ndarray
    structure: Structure
    family: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Values of options: float64 [1, I, K]."""
        return self.rest + self.train[:, None] * self.share


def make_clients(count: int, subnets: int, operations: int) -> Clients:
    """Make clients of all families in turn; client c is the same whatever ``count`` is.

    Args:
        count: How many clients.
        subnets: Subnets of the model.
        operations: 3, or 4 with FROZEN.
    """
    blocks = max(b for b in range(1, min(12, subnets) + 1) if subnets % b == 0)
    block = np.repeat(np.arange(blocks), subnets // blocks)
    draw = np.random.default_rng(0)
    train, forward = draw.gamma(2.0, 0.5, (2, subnets))
    # Options: SHORTCUT, FORWARD_ONLY, FULL. With FROZEN: SHORTCUT, FORWARD_ONLY, FROZEN, FULL, and
    # FORWARD_ONLY again, for blocks below all trained ones, where it is worth as much as FROZEN.
    frozen = operations == 4
    compute = np.array([0, 1 / 3, 3 / 4, 1, 1 / 3] if frozen else [0, 1 / 3, 1])
    live = np.array([0, 0, 1, 1, 0] if frozen else [0, 0, 1])
    runs = (compute > 0).astype(float)
    share = (compute == 1).astype(float)
    uncut = np.array([0, 0, 1, 1, 1] if frozen else [0, 0, 0])
    rest = (forward[:, None] * (runs + 0.5 * uncut))[None]

    def costs_of(flops: np.ndarray, memory: np.ndarray, size: np.ndarray) -> tuple:
        """Return costs [I, K, 4] and openings [G, 2 or 3, 4] from relative costs of subnets [I]."""
        items = np.empty((subnets, len(compute), 4))
        items[..., 0] = np.outer(flops, compute)
        items[..., 1] = 0.7 * np.outer(memory, live) + np.outer(size, 0.1 * runs + 0.3 * share)
        items[..., 2], items[..., 3] = np.outer(size, share), np.outer(size, runs)
        of_blocks = [np.bincount(block, x) / np.bincount(block) for x in (memory, size)]
        openings = np.zeros((blocks, 3, 4))  # resident, live, trained
        openings[:, 0, 3] = openings[:, 2, 2] = 0.2 * of_blocks[1]
        openings[:, 1, 1] = 2.0 * of_blocks[0]
        if not frozen:
            openings = np.stack([openings[:, 0], openings[:, 1] + openings[:, 2]], axis=1)
        return (items * UNIT).astype(np.int64), (openings * UNIT).astype(np.int64)

    one = np.ones(subnets)
    stage = block * STAGES // blocks
    common = [
        costs_of(one, 2.0 - (block + 1) / blocks, one),
        costs_of(one, 2.0 ** (STAGES - 1 - stage), 4.0**stage / 8),
    ]
    family = np.arange(count) % 3
    draws = [np.random.default_rng([1, c]) for c in range(count)]
    varied = [
        costs_of(*draws[c].uniform(0.5, 1.5, (3, subnets))) for c in np.flatnonzero(family > 1)
    ]
    items, openings = (np.stack(parts) for parts in zip(*common, *varied, strict=True))
    tables = np.where(family < 2, family, 2 + np.arange(count) // 3)
    full = items[:, :, share.argmax()].sum(axis=1) + openings.sum(axis=(1, 2))
    shares = np.stack([draw.uniform(0.03, 0.9, 4) for draw in draws])
    groups, modes, allowed = block, None, None
    levels = np.array([0, 1, 2, 3, 1] if frozen else [0, 1, 2])
    if frozen:
        modes = (np.arange(blocks) < np.arange(blocks)[:, None]).astype(np.int64)
        allowed = np.array([[1, 1, 1, 1, 0], [1, 0, 0, 0, 1]], dtype=bool)
    return Clients(
        train,
        rest,
        share,
        items,
        (full[tables] * shares).astype(np.int64),
        tables,
        Structure(groups, levels, openings, modes, allowed),
        family,
    )
