"""What a micro-batch, forward and backward, takes in memory beyond what is there before it.

**Saved for backward**, in a micro-batch with N examples, n_l of them live in the block (something
FULL or FROZEN), n_t training in it (something FULL), with elements of c bytes (4, or 2 in
bfloat16):

    a block's two branches, each   4 N T D + 8 n_l T + c n_t T D    x, statistics, y
                                   (+ c N T D with layer scale, where anything trains)
    a FULL or FROZEN subnet        c T (4 d + f) + 4 T              q, k, v, output; log-sum; hidden
    a FULL one besides             c T f                            activated hidden

which is 4 + 12 = 16 units of T D for a usual block with everything FULL, 4 of them with the first
FULL subnet: that is why opening a block is a charge of its own. Head norms, gates, dropout, and
attention that is not fused and has matrices [T, T], add what
:class:`~d2ft_fl.costs.activations.ActivationBytes` says. Checkpointed, only x stays.

Under LoRA a product with factors keeps c n_t T r for the gradient of the factor on the far side of
it, with r the largest rank of what is FULL in a slot; y and z stay only for the gradient of an A;
and the lowest branch that trains keeps neither x nor, where nothing before its product out trains,
what its subnets have in the middle.

**Transients** come on top. The peak of a micro-batch is the largest of what is alive at these
moments, with a stream for one tensor [N, T, D]:

* forward in a branch: what lower branches saved, x, y, the sum, and first, for the head group
  outside the graph at hand, its products in and its z; then what the branch saves;
* backward in a branch: what it and lower ones saved, the gradient that arrives, and for the head
  group at hand, FULL and FROZEN heads together, the gradients of z and of products in (of q, k, v
  twice, when they are put together), then those of products in and of y;
* after it: the gradients of y and x;
* with everything saved, on the way back: the loss, which has log-probabilities and two gradients
  of scores; the classifier, whose gradient is made anew before it is added to the one that is
  held; the final norm, with the gradient of x;
* the embedding, with nothing saved.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.engine.grouping import Part, groups
from d2ft_fl.subnets.schedule import BranchOperations, Operation


@dataclass(frozen=True)
class MicroBatchMemory:
    """Memory of micro-batches, branch by branch from the first: int64 [micro-batches, 2 blocks].

    All values are bytes.

    Attributes:
        saved: Kept for backward by each branch.
        forward: On the way forward in a branch, at most, beside what lower branches saved.
        backward: On the way back, at most, beside what this and lower branches saved.
        outer: In loss and final norm, beside what all branches saved: [micro-batches].
        classifier: In the classifier, beside that and its gradient.
        gradient: Of the classifier, made anew.
        embedding: In the embedding, at most: [micro-batches].
    """

    saved: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    outer: np.ndarray
    classifier: np.ndarray
    gradient: int
    embedding: np.ndarray

    @classmethod
    def of(
        cls,
        activations: ActivationBytes,
        checkpointing: bool,
        operations: np.ndarray,
        sizes: np.ndarray,
        ranks: np.ndarray,
    ) -> "MicroBatchMemory":
        """Work it out, for many micro-batches at once.

        Args:
            activations: What one example takes.
            checkpointing: Whether activations are computed again.
            operations: int8 [micro-batches, slots, blocks, heads].
            sizes: Examples of each slot: int64 [micro-batches, slots].
            ranks: Of heads that train, else 0: int64 [micro-batches, blocks, heads].
        """
        moments = Moments(activations, checkpointing, operations, sizes, ranks)
        branches = len(sizes), -1
        return cls(
            saved=moments.saved.reshape(branches),
            forward=moments.forward().reshape(branches),
            backward=moments.backward().reshape(branches),
            outer=moments.outer(),
            classifier=moments.classifier(),
            gradient=activations.gradient,
            embedding=moments.embedding(),
        )

    def peak(self) -> np.ndarray:
        """Return the most bytes that are alive at once: int64 [micro-batches]."""
        below = np.cumsum(self.saved, axis=1) - self.saved
        moments = np.maximum(below + self.forward, below + self.saved + self.backward).max(axis=1)
        outer = self.saved.sum(axis=1) + np.maximum(self.outer, self.classifier + self.gradient)
        return np.maximum(np.maximum(moments, outer), self.embedding)


class ExampleCounts:
    """On how many examples of micro-batches heads and branches do what.

    Attributes:
        total: Examples: int64 [micro-batches, 1, 1].
        full: On which a head is FULL: int64 [micro-batches, blocks, 2, heads].
        deep: On which a head is FULL, and gradient goes through it.
        frozen: On which a head is FROZEN.
        live: On which anything of a branch is FULL or FROZEN: int64 [micro-batches, blocks, 2].
        training: On which anything of a branch is FULL.
        through: On which a branch is live, and gradient goes on below it.
        running: On which anything of a branch runs.
        beside: On which something is live, and something runs outside the graph.
        most_ranks: Sum over examples of the largest rank that is FULL in a branch, 0 where there
            is none: int64 [micro-batches, blocks, 2].
    """

    def __init__(
        self,
        run: BranchOperations,
        sizes: np.ndarray,
        inward_trains: np.ndarray,
        ranks: np.ndarray | None,
    ):
        """Count.

        Args:
            run: Operations by branch, of [micro-batches, slots, blocks, 2, heads].
            sizes: Examples of each slot: int64 [micro-batches, slots].
            inward_trains: Whether anything between norm and product out trains: bool [2].
            ranks: int64 [micro-batches, blocks, heads]; None where no factor keeps anything.
        """
        full, frozen = run.operations == Operation.FULL, run.operations == Operation.FROZEN
        live = (full | frozen).any(axis=4)
        self.total = sizes.sum(axis=1)[:, None, None]
        self.full = examples_where(sizes, full)
        self.deep = examples_where(sizes, full & (run.through | inward_trains)[..., None])
        self.frozen = examples_where(sizes, frozen)
        self.live = examples_where(sizes, live)
        self.training = examples_where(sizes, full.any(axis=4))
        self.through = examples_where(sizes, live & run.through)
        self.running = examples_where(sizes, (run.operations != Operation.SHORTCUT).any(axis=4))
        silent = (run.operations == Operation.FORWARD_ONLY).any(axis=4)
        self.beside = examples_where(sizes, silent & live)
        if ranks is None:
            self.most_ranks = np.int64(0) * self.training
        else:
            largest = (full * ranks[:, None, :, None]).max(axis=4)
            self.most_ranks = examples_where(sizes, largest)  # of [micro-batches, slots, blocks, 2]


class Moments:
    """The moments of micro-batches at which most memory may be in use.

    Bytes of branches are int64 [micro-batches, blocks, 2].

    Args:
        activations: What one example takes.
        checkpointing: Whether activations are computed again.
        operations: int8 [micro-batches, slots, blocks, heads].
        sizes: Examples of each slot: int64 [micro-batches, slots].
        ranks: Of heads that train, else 0: int64 [micro-batches, blocks, heads].
    """

    def __init__(
        self,
        activations: ActivationBytes,
        checkpointing: bool,
        operations: np.ndarray,
        sizes: np.ndarray,
        ranks: np.ndarray,
    ):
        self.bytes = activations
        self.checkpointing = checkpointing
        self.operations = operations
        self.sizes = sizes
        self.ranks = ranks
        self.run = BranchOperations.of(operations, activations.trains)
        inward_trains = np.array([branch.inward for branch in activations.trains])
        kept_by_rank = ranks if activations.ranked.any() else None
        self.count = ExampleCounts(self.run, sizes, inward_trains, kept_by_rank)

    @cached_property
    def inputs(self) -> np.ndarray:
        """Examples of which x, the branch's input, is saved: all or none."""
        needed = self.count.live if self.checkpointing else self.count.through
        return self.count.total * (needed > 0)

    @cached_property
    def factors(self) -> np.ndarray:
        """Bytes that a branch keeps for the gradients of LoRA's factors."""
        b, n = self.bytes, self.count
        kept = b.masked * n.training + b.ranked * n.most_ranks
        return kept + (n.full * b.dropped).sum(axis=3)

    @cached_property
    def between_factors(self) -> np.ndarray:
        """Bytes of an example between LoRA's factors, for a moment."""
        rank = self.ranks.max(axis=2)[..., None]  # [micro-batches, blocks, 1]
        return self.bytes.near * rank + self.bytes.drops * (rank > 0)

    @cached_property
    def saved(self) -> np.ndarray:
        """Bytes that a branch keeps for its backward pass."""
        b, n = self.bytes, self.count
        saved = b.stream * self.inputs
        saved += n.total * (b.narrow * b.scaled * (n.training > 0) + b.mask * (n.live > 0))
        if self.checkpointing:
            return saved
        saved += b.statistics * n.through + (b.narrow * b.keeps_y + b.normed) * n.training
        saved += self.factors
        saved += ((n.deep + n.frozen) * b.alive + n.deep * b.full).sum(axis=3)
        saved += ((n.full - n.deep) * b.shallow).sum(axis=3)
        return saved

    @cached_property
    def cast_weights(self) -> np.ndarray | np.int64:
        """Bytes of the weights of products in, cast to bfloat16 for as long as the branch runs."""
        if not self.bytes.casts:
            return np.int64(0)
        resident = (self.operations != Operation.SHORTCUT).any(axis=1)
        return resident @ self.bytes.weights.T

    def forward(self) -> np.ndarray:
        """Return bytes on the way forward in a branch, at most, with what it saves."""
        b, n = self.bytes, self.count
        whole_sum = (n.running > 0) * n.total * b.narrow
        whole_y = n.running * b.narrow
        passing = np.int64(0) if self.checkpointing else self.largest(True, b.besides[1])
        # The product out that adds to what ran outside the graph makes a new tensor. It takes z of
        # all heads, of which only what FULL ones put in is saved.
        partly = n.frozen.any(axis=3) & ~b.saves_result
        passing = np.maximum(passing, n.beside * b.narrow + partly * self.largest(True, b.result))
        outside = self.largest(False, b.inward + b.outward + b.besides[0])
        if self.checkpointing:  # what passes gradient is not saved either
            outside = np.maximum(outside, self.largest(True, b.inward + b.outward + b.besides[0]))
        # Before y is cast, it is there once more as it was.
        outside = np.maximum(outside + self.cast_weights, b.casts * b.stream * n.running)
        saved_y = n.training * b.keeps_y * (not self.checkpointing)
        y = whole_y - b.narrow * saved_y
        x = b.stream * (n.total - self.inputs)  # it is there all the same where it is not saved
        if self.sizes.shape[1] > 1:  # sums of slots are put together
            passing = np.maximum(passing, whole_sum - y)
        first = n.total * b.stream + outside + whole_y + whole_sum
        total = np.maximum(first, self.saved + passing + self.cast_weights + x + y + whole_sum)
        return total + self.between_factors * n.running

    def backward_middle(self) -> np.ndarray:
        """Return bytes of the largest head group on the way back, from its sum to the norm.

        Checkpointed, what is computed again is among them.
        """
        b, n = self.bytes, self.count
        # q, k and v get their gradients one by one, which are then put together.
        twice = b.inward * np.array([[2], [1]])
        gradients = np.maximum(twice + b.outward - b.result, b.inward + b.outward)
        if self.checkpointing:  # the gradient of z is held meanwhile
            gradients = twice + b.outward + b.alive
        middle = self.largest(True, gradients + b.besides[2])
        if self.checkpointing:
            middle = middle + (b.statistics + b.narrow + b.normed) * n.live + self.factors
        elif self.sizes.shape[1] == 1 and b.near.any():
            # What of z was saved is gone when its gradient has come. Without LoRA, whose prices
            # allow for it, the planner's lower bounds of memory would be above the cost.
            z = (n.deep * b.full).sum(axis=3)
            middle = np.maximum(middle - z, self.largest(True, b.outward))
        gradient_of_y = (b.narrow + b.stream * 3 * b.rms) * n.through
        if self.sizes.shape[1] > 1:  # of other slots, the gradient of x is there
            return middle + gradient_of_y
        return np.maximum(middle, self.largest(True, b.inward) + gradient_of_y + self.held_z)

    @cached_property
    def held_z(self) -> np.ndarray | np.int64:
        """Bytes of the gradient of z, which is held while a checkpointed branch goes back."""
        return self.largest(True, self.bytes.result) if self.checkpointing else np.int64(0)

    def backward(self) -> np.ndarray:
        """Return bytes on the way back in a branch, at most, beside what branches saved."""
        b, n = self.bytes, self.count
        arriving = n.total * (b.stream * (1 + b.scaled) + b.narrow * b.casts + b.regraded)
        # Of y before and behind its cast, then of x, and the sum with the one that arrived.
        after = (2 * n.total * b.stream + self.held_z) * (n.through > 0)
        after += b.stream * 3 * b.rms * n.through
        middle = self.backward_middle() + self.cast_weights + self.between_factors * n.live
        return (n.live > 0) * (arriving + np.maximum(middle, after))

    def outer(self) -> np.ndarray:
        """Return bytes in loss and final norm, beside what branches saved: int64 [micro-batches].

        The gradient of x is alive with what the norm's steps are put together from.
        """
        b = self.bytes
        norm = b.stream * (1 + 3 * b.rms)
        return self.sizes.sum(axis=1) * (b.outer + max(3 * b.scores, norm)) + b.classifier

    def classifier(self) -> np.ndarray:
        """Return bytes in the classifier, beside what branches saved and its gradient.

        Returns:
            int64 [micro-batches].
        """
        b = self.bytes
        scores = b.cast_scores or b.scores
        return self.sizes.sum(axis=1) * (b.outer + scores)

    def embedding(self) -> np.ndarray:
        """Return bytes in the embedding: int64 [micro-batches]."""
        return 3 * self.sizes.sum(axis=1) * self.bytes.embedded

    def largest(self, alive: bool, per_head: np.ndarray) -> np.ndarray:
        """Return the bytes of the largest head group of each branch.

        Args:
            alive: Of those that gradient passes through, or of those outside the graph.
            per_head: Bytes of an example and head: int64 [2, heads].
        """
        operations, slots = self.run.operations, self.sizes.shape[1]
        if slots == 1:  # one slot has one head group
            of_slot = operations[:, 0]
            does = of_slot >= Operation.FROZEN if alive else of_slot == Operation.FORWARD_ONLY
            return self.sizes[..., None] * (does * per_head).sum(axis=3)
        largest = np.zeros((len(self.sizes), operations.shape[2], 2), dtype=np.int64)
        for index, block, branch in np.ndindex(largest.shape):
            column = operations[index, :, block, branch].tobytes()
            through = self.run.through[index, :, block, branch].tobytes()
            factored = bool(self.bytes.near[branch])
            for start, stop, heads in _head_groups(column, through, slots, factored, alive):
                examples = int(self.sizes[index, start:stop].sum())
                load = examples * int(per_head[branch, list(heads)].sum())
                largest[index, block, branch] = max(int(largest[index, block, branch]), load)
        return largest


def examples_where(sizes: np.ndarray, per_slot: np.ndarray) -> np.ndarray:
    """Sum the examples of slots in which something is so: int64 [micro-batches, ...].

    Args:
        sizes: Examples of each slot: int64 [micro-batches, slots].
        per_slot: Whether it is so, or how much each example counts: [micro-batches, slots, ...].
    """
    if sizes.shape[1] == 1:
        return per_slot[:, 0] * sizes.reshape(len(sizes), *[1] * (per_slot.ndim - 2))
    return np.einsum("ps,ps...->p...", sizes, per_slot.astype(np.int64))


@lru_cache(maxsize=1 << 16)
def _head_groups(
    operations: bytes, through: bytes, slots: int, factored: bool, alive: bool
) -> list[Part]:
    """Return the engine's head groups of a branch.

    Args:
        operations: As they run, int8 [slots, heads].
        through: Whether gradient goes on below, bool [slots].
        slots: How many there are.
        factored: Whether heads that train have LoRA's factors.
        alive: Those that gradient passes through, or those outside the graph.
    """
    table = np.frombuffer(operations, dtype=np.int8).reshape(slots, -1)
    segments = groups(table, np.frombuffer(through, dtype=bool), range(table.shape[1]), factored)
    return [part for group in segments for part in (group.alive if alive else group.silent)]
