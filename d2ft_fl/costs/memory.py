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

* forward in a branch: what lower branches saved, x, y, the sum, and for the head group at hand its
  products in and its z (saved or not);
* backward in a branch: what it and lower ones saved, the gradient that arrives, the gradient of y,
  and for all FULL head groups, then all FROZEN ones, the gradients of z and of products in (of q,
  k, v twice, when they are put together);
* after it: the gradient of x in place of the head groups';
* the classifier, with everything saved; the embedding, with nothing.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from d2ft_fl.costs.activations import ActivationBytes
from d2ft_fl.engine.grouping import Part, groups, storage_order
from d2ft_fl.subnets.schedule import BranchOperations, Operation, effective


@dataclass(frozen=True)
class MicroBatchMemory:
    """Memory of micro-batches, branch by branch from the first: int64 [micro-batches, 2 blocks].

    All values are bytes.

    Attributes:
        saved: Kept for backward by each branch.
        forward: On the way forward in a branch, at most, beside what lower branches saved.
        backward: On the way back, at most, beside what this and lower branches saved.
        outer: In the classifier, beside what all branches saved: [micro-batches].
        embedding: In the embedding, at most: [micro-batches].
    """

    saved: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    outer: np.ndarray
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
            embedding=moments.embedding(),
        )

    def peak(self) -> np.ndarray:
        """Return the most bytes that are alive at once: int64 [micro-batches]."""
        below = np.cumsum(self.saved, axis=1) - self.saved
        moments = np.maximum(below + self.forward, below + self.saved + self.backward).max(axis=1)
        return np.maximum(np.maximum(moments, self.saved.sum(axis=1) + self.outer), self.embedding)


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
        self.casts = activations.narrow != activations.stream  # products are in bfloat16

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
        if not self.casts:
            return np.int64(0)
        resident = (self.operations != Operation.SHORTCUT).any(axis=1)
        return resident @ self.bytes.weights.T

    def forward_middle(self) -> np.ndarray:
        """Return the bytes of the largest head group on its way forward."""
        b = self.bytes
        without_graph = b.inward + b.outward + b.unfused[0]
        with_graph = without_graph if self.checkpointing else b.unfused[1]
        largest = self.largest(Operation.FORWARD_ONLY, without_graph)
        if with_graph.any():
            for operation in (Operation.FULL, Operation.FROZEN):
                largest = np.maximum(largest, self.largest(operation, with_graph))
        return largest

    def forward(self) -> np.ndarray:
        """Return bytes on the way forward in a branch, at most, with what it saves."""
        b, n = self.bytes, self.count
        # What is not saved of y; and for a moment, before it is cast, once more as it was.
        saved_y = n.training * b.keeps_y * (not self.checkpointing)
        y = b.narrow * (n.running - saved_y)
        middle = self.forward_middle() + self.cast_weights
        middle = np.maximum(middle, self.casts * b.stream * n.running)
        stream = b.stream * (n.total - self.inputs)  # x is there all the same where it is not saved
        total = self.saved + middle + stream + (n.running > 0) * (y + n.total * b.narrow)
        return total + self.between_factors * n.running

    def backward_middle(self) -> np.ndarray:
        """Return the bytes of all FULL head groups, or all FROZEN ones, on the way back.

        Checkpointed, what is computed again is among them.
        """
        b, n = self.bytes, self.count
        # q, k and v get their gradients one by one, which are then put together.
        gradients = b.inward * np.array([[2], [1]]) + b.outward
        if self.checkpointing:
            gradients = gradients + b.alive
        middle = np.maximum(
            self.largest(Operation.FULL, gradients, together=True),
            self.largest(Operation.FROZEN, gradients, together=True),
        )
        if b.unfused[2].any():  # one head group after the other
            alone = [self.largest(o, b.unfused[2]) for o in (Operation.FULL, Operation.FROZEN)]
            middle = middle + np.maximum(*alone)
        if self.checkpointing:
            middle = middle + (b.statistics + b.narrow + b.normed) * n.live + self.factors
        return middle

    def backward(self) -> np.ndarray:
        """Return bytes on the way back in a branch, at most, beside what branches saved."""
        b, n = self.bytes, self.count
        arriving = n.total * (b.stream * (1 + b.scaled) + b.narrow * self.casts + b.regraded)
        gradient_of_y = (b.narrow + b.stream * 3 * b.rms) * n.through
        gradient_of_y = gradient_of_y + self.between_factors * n.live
        after = 2 * n.total * b.stream * (n.through > 0)
        middle = np.maximum(self.backward_middle() + self.cast_weights, after)
        return (n.live > 0) * (arriving + gradient_of_y + middle)

    def outer(self) -> np.ndarray:
        """Return bytes in the classifier, beside what branches saved: int64 [micro-batches]."""
        b = self.bytes
        return self.sizes.sum(axis=1) * (b.outer + b.stream * (1 + 3 * b.rms)) + b.classifier

    def embedding(self) -> np.ndarray:
        """Return bytes in the embedding: int64 [micro-batches]."""
        return 3 * self.sizes.sum(axis=1) * self.bytes.embedded

    def largest(
        self, operation: Operation, per_head: np.ndarray, together: bool = False
    ) -> np.ndarray:
        """Return the bytes of an operation's largest head group in each branch.

        Args:
            operation: Which head groups count.
            per_head: Bytes of an example and head: int64 [2, heads].
            together: Take the head groups of a segment as one.
        """
        slots = self.sizes.shape[1]
        if slots == 1:  # one slot has one head group
            does = self.run.operations[:, 0] == operation
            return self.sizes[..., None] * (does * per_head).sum(axis=3)
        largest = np.zeros((len(self.sizes), self.operations.shape[2], 2), dtype=np.int64)
        stored = effective(self.operations)
        for index, block, branch in np.ndindex(largest.shape):
            column = self.run.operations[index, :, block, branch]
            through = self.run.through[index, :, block, branch]
            order = stored[index, :, block]
            for head_groups in _head_groups(
                column.tobytes(), through.tobytes(), order.tobytes(), slots, operation
            ):
                loads = [
                    int(self.sizes[index, start:stop].sum())
                    * int(per_head[branch, list(heads)].sum())
                    for start, stop, heads in head_groups
                ]
                load = sum(loads) if together else max(loads)
                largest[index, block, branch] = max(int(largest[index, block, branch]), load)
        return largest


def examples_where(sizes: np.ndarray, per_slot: np.ndarray) -> np.ndarray:
    """Sum the examples of slots in which something is so: int64 [micro-batches, ...].

    Args:
        sizes: Examples of each slot: int64 [micro-batches, slots].
        per_slot: Whether it is so, or how much each example counts: [micro-batches, slots, ...].
    """
    if sizes.shape[1] == 1:
        return per_slot[:, 0] * sizes.reshape(-1, *[1] * (per_slot.ndim - 2))
    return np.einsum("ps,ps...->p...", sizes, per_slot.astype(np.int64))


@lru_cache(maxsize=1 << 16)
def _head_groups(
    operations: bytes, through: bytes, stored: bytes, slots: int, operation: Operation
) -> list[list[Part]]:
    """Return the engine's head groups of one operation, segment by segment, of a branch.

    Args:
        operations: As they run, int8 [slots, heads].
        through: Whether gradient goes on below, bool [slots].
        stored: Operations by which heads are stored, int8 [slots, heads].
        slots: How many there are.
        operation: Which head groups count.
    """

    def table(data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.int8).reshape(slots, -1)

    wanted = np.frombuffer(through, dtype=bool)
    segments = groups(table(operations), wanted, storage_order(table(stored)))
    return [group.head_groups[operation] for group in segments if group.head_groups[operation]]
