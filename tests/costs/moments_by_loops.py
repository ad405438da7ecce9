"""Memory of a micro-batch, branch by branch and slot by slot, as the costs' docstrings tell it."""

from dataclasses import replace

import numpy as np

from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.engine.grouping import groups
from d2ft_fl.subnets.schedule import BranchOperations


class BranchMoments:
    """Bytes of one branch of one block in one micro-batch.

    Args:
        b: Bytes of an example.
        branch: Which of a block's two branches.
        operations: What its heads do: [slots, heads].
        through: Whether gradient goes on below: [slots].
        sizes: Examples of each slot.
        resident: Whether any slot runs a head: [heads].
        ranks: At which heads train, else 0: [heads].
        checkpointing: Whether activations are computed again.
    """

    def __init__(
        self,
        b: ActivationBytes,
        branch: int,
        operations: np.ndarray,
        through: np.ndarray,
        sizes: list[int],
        resident: np.ndarray,
        ranks: np.ndarray,
        checkpointing: bool,
    ):
        self.b, self.branch, self.sizes, self.again = b, branch, sizes, checkpointing
        self.operations, self.through = operations, through
        self.total, trains = sum(sizes), b.trains[branch]
        slots = list(zip(sizes, operations.tolist(), through.tolist(), strict=True))
        self.live = sum(n for n, does, _ in slots if max(does) >= 2)
        self.training = sum(n for n, does, _ in slots if 3 in does)
        self.passing = sum(n for n, does, deep in slots if max(does) >= 2 and deep)
        self.running = sum(n for n, does, _ in slots if any(does))
        self.beside = sum(n for n, does, _ in slots if max(does) >= 2 and 1 in does)
        self.frozen = any(n and 2 in does for n, does, _ in slots)
        # Of each head: whether gradient goes through it is a question of the slot.
        heads = range(operations.shape[1])
        self.full = [sum(n for n, does, _ in slots if does[h] == 3) for h in heads]
        self.deep = [
            sum(n for n, does, deep in slots if does[h] == 3 and (deep or trains.inward))
            for h in heads
        ]
        self.still = [sum(n for n, does, _ in slots if does[h] == 2) for h in heads]
        self.ranks_of_examples = sum(
            n * max([ranks[h] for h in heads if does[h] == 3], default=0) for n, does, _ in slots
        )
        self.rank = int(max(ranks))
        self.cast = sum(b.weights[branch][h] for h in heads if resident[h]) * b.casts

    def largest(self, alive: bool, per_head: np.ndarray) -> int:
        """The bytes of the head group that takes the most."""
        factored, most = bool(self.b.near[self.branch]), 0
        order = range(len(self.full))
        for group in groups(self.operations, self.through, order, factored):
            for start, stop, heads in group.alive if alive else group.silent:
                load = sum(self.sizes[start:stop]) * sum(per_head[h] for h in heads)
                most = max(most, int(load))
        return most

    @property
    def factors(self) -> int:
        """Kept for the gradients of LoRA's factors."""
        b, at = self.b, self.branch
        dropped = sum(n * bytes_ for n, bytes_ in zip(self.full, b.dropped[at], strict=True))
        return b.masked[at] * self.training + b.ranked[at] * self.ranks_of_examples + dropped

    @property
    def between(self) -> int:
        """Of an example, between LoRA's factors."""
        return self.b.near[self.branch] * self.rank + (
            self.b.drops[self.branch] if self.rank else 0
        )

    @property
    def keeps_input(self) -> bool:
        """Whether x is saved: all of it or nothing."""
        return bool(self.live if self.again else self.passing)

    @property
    def saved(self) -> int:
        """Kept for the backward pass."""
        b, at = self.b, self.branch
        total = b.stream * self.total if self.keeps_input else 0
        if self.training and b.scaled:
            total += b.narrow * self.total
        if self.live:
            total += b.mask * self.total
        if self.again:
            return total
        total += b.statistics * self.passing + self.factors
        total += (b.normed + (b.narrow if b.keeps_y[at] else 0)) * self.training
        for head, (full, deep, still) in enumerate(
            zip(self.full, self.deep, self.still, strict=True)
        ):
            total += (deep + still) * b.alive[at][head] + deep * b.full[at][head]
            total += (full - deep) * b.shallow[at][head]
        return total

    def forward(self) -> int:
        """The most on the way forward."""
        b, at, many = self.b, self.branch, len(self.sizes) > 1
        whole = b.narrow * self.total if self.running else 0  # the sum
        y = b.narrow * self.running
        x = 0 if self.keeps_input else b.stream * self.total
        middle = b.inward[at] + b.outward[at] + b.besides[0][at]
        outside = self.largest(False, middle)
        if self.again:
            outside = max(outside, self.largest(True, middle))
        outside += self.cast
        if b.casts:
            outside = max(outside, b.stream * self.running)
        first = b.stream * self.total + outside + y + whole
        kept_y = b.narrow * self.training if b.keeps_y[at] and not self.again else 0
        second = 0 if self.again else self.largest(True, b.besides[1][at])
        takes_z = self.frozen and not b.saves_result[at]
        second = max(second, b.narrow * self.beside + takes_z * self.largest(True, b.result[at]))
        if many:  # sums of slots are put together
            second = max(second, whole - (y - kept_y))
        then = self.saved + second + self.cast + x + y - kept_y + whole
        return max(first, then) + self.between * self.running

    def backward(self) -> int:
        """The most on the way back."""
        if not self.live:
            return 0
        b, at, many = self.b, self.branch, len(self.sizes) > 1
        arriving = b.stream + b.regraded + (b.stream if b.scaled else 0)
        arriving += b.narrow if b.casts else 0
        twice = b.inward[at] * (2 if at == 0 else 1)
        of_z = 0
        if self.again:
            of_z = self.largest(True, b.result[at])
            middle = self.largest(True, twice + b.outward[at] + b.alive[at] + b.besides[2][at])
            middle += (b.statistics + b.narrow + b.normed) * self.live + self.factors
        else:
            of_head = np.maximum(twice + b.outward[at] - b.result[at], b.inward[at] + b.outward[at])
            middle = self.largest(True, of_head + b.besides[2][at])
            if not many and b.near.any():
                z = sum(n * bytes_ for n, bytes_ in zip(self.deep, b.full[at], strict=True))
                middle = max(middle - z, self.largest(True, b.outward[at]))
        norm = (b.narrow + (3 * b.stream if b.rms else 0)) * self.passing
        if many:
            middle += norm
        else:
            middle = max(middle, self.largest(True, b.inward[at]) + norm + of_z)
        middle += self.cast + self.between * self.live
        after = 0
        if self.passing:
            after = 2 * b.stream * self.total + of_z + 3 * b.stream * b.rms * self.passing
        return arriving * self.total + max(middle, after)


def branch_moments(
    b: ActivationBytes,
    checkpointing: bool,
    operations: np.ndarray,
    sizes: list[int],
    ranks: np.ndarray,
) -> list[BranchMoments]:
    """The branches of all blocks in their order, of one micro-batch."""
    run = BranchOperations.of(operations, b.trains)
    return [
        BranchMoments(
            b,
            branch,
            run.operations[:, block, branch],
            run.through[:, block, branch],
            sizes,
            (operations[:, block] > 0).any(axis=0),
            ranks[block],
            checkpointing,
        )
        for block in range(operations.shape[1])
        for branch in range(2)
    ]


def peak(b: ActivationBytes, branches: list[BranchMoments], examples: int) -> int:
    """The most that is alive at once."""
    moments, below = [3 * b.embedded * examples], 0
    for one in branches:
        moments += [below + one.forward(), below + one.saved + one.backward()]
        below += one.saved
    loss = examples * (b.outer + 3 * b.scores) + b.classifier
    classifier = examples * (b.outer + (b.cast_scores or b.scores)) + b.gradient
    norm = examples * (b.outer + b.stream * (4 if b.rms else 1)) + b.classifier
    return max(*moments, below + loss, below + classifier, below + norm)


def drawn(like: ActivationBytes, seed: int, **flags: object) -> ActivationBytes:
    """Bytes that are all different, a few hundred each, so that each moment may be the most."""
    draw = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return draw.integers(50, 1000, shape)

    heads = like.alive.shape[1]
    names = "stream embedded narrow statistics normed classifier mask regraded"
    numbers = {name: int(some(1)[0]) for name in names.split()}
    by_head = "alive full shallow dropped inward outward result weights"
    tables = {name: some(2, heads) for name in by_head.split()}
    pairs = {name: some(2) for name in ("ranked", "masked", "near", "drops")}
    yes_no = {name: draw.integers(0, 2, 2) > 0 for name in ("keeps_y", "saves_result")}
    rest = {"scaled": bool(seed & 1), "rms": bool(seed & 2), "besides": some(3, 2, heads)}
    return replace(like, **(numbers | tables | pairs | yes_no | rest | flags))
