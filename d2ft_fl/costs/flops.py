"""FLOPs of operations, branch by branch.

**FLOPs** follow torch's ``FlopCounterMode``: 2 for a multiply-add, products and attention only.
With T tokens, head width d, feed-forward slice f and model width D, one example of one subnet has

    products in   P_in  = T D (3 d + f)      (4 d + f with an attention gate)
    products out  P_out = T D (d + f)
    attention     A = 2 T^2 d, the FLOPs of one of its products

    forward                 2 (P_in + P_out) + 2 A
    gradient through it     2 (P_in + P_out) + 5 A   (4 A unfused: `d2ft_fl.engine.attention`)
    gradient of its weights 2 (P_in + P_out)
    again, if checkpointed  2 P_in + 2 A             (neither norm nor product out is needed twice)

FORWARD_ONLY pays the first, FROZEN the first, second and fourth, FULL all. Strictly below the
lowest block that trains in a slot FROZEN is FORWARD_ONLY. The embedding runs forward, and the
classifier forward, through and for its weights: 6 D classes.

Under LoRA of rank r the weights of a FULL subnet pay nothing; for each product with factors, p rows
of it the subnet's (3 d or f in, d or f out), on each example

    a subnet that is FULL in any slot    forward 2 T p r, through it 2 T p r, of its factor 2 T p r
    its block, besides                   forward 2 T D r, through it 2 T D r, of the other 2 T D r

the block once a slot and operation of such subnets. Gradients pass through a product in only where
something below trains: in the lowest branch that trains they end at its factors. Factors of subnets
that never are FULL are merged into their weights, 2 p D r once a round. A subnet that trains at a
rank r_h below r pays in proportion to r_h, and merges the rest, 2 p D (r - r_h); its block pays by
the largest rank of the subnets that do an operation in a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.branches import BranchKind, Trains
from d2ft_fl.subnets.schedule import BranchOperations, Operation

_ALL = (Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL)


@dataclass(frozen=True)
class BranchFlops:
    """FLOPs of one example, by operation and whether gradient goes on below: int64.

    Attributes:
        base: Of a head's weights: [operations, 2, 2 branches, heads].
        near: Of a head's LoRA factors, for heads that train, per rank: [operations, 2, 2 branches,
            heads].
        far: Of the LoRA factors that a block's heads share, where heads that train do the
            operation, per rank of the largest: [operations, 2, 2 branches].
    """

    base: np.ndarray
    near: np.ndarray
    far: np.ndarray

    @classmethod
    def of(cls, arch: Architecture, fused: bool, checkpointing: bool) -> "BranchFlops":
        """Count the FLOPs of an architecture; formulae are in the module's docstring.

        Args:
            arch: The architecture, with as many tokens as blocks see.
            fused: Whether attention is torch's fused one.
            checkpointing: Whether activations are computed again.
        """
        shape = len(Operation), 2, 2, arch.heads
        base, near = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        far = np.zeros(shape[:3], dtype=np.int64)
        for branch, spec in enumerate(arch.branches):
            trains, rows = arch.trains[branch], arch.rows_in(branch)
            inward, adapted = sum(rows.values(), np.int64(0)), rows[spec.inward[0]]
            outward = np.array(spec.widths, dtype=np.int64)
            attends = spec.kind is BranchKind.ATTENTION
            product = 2 * arch.tokens**2 * outward * attends  # one product of attention
            ahead, back = 2 * product, (5 if fused else 4) * product
            into, out = (2 * arch.tokens * arch.dim * width for width in (inward, outward))
            again = checkpointing * (into + ahead)
            for through in range(2):
                deep = through or trains.inward
                base[Operation.FORWARD_ONLY, through, branch] = into + out + ahead
                base[Operation.FROZEN, through, branch] = (
                    into + out + ahead + into + out + back + again
                )
                full = into + out + ahead + again
                full = full + bool(deep) * (out + back) + through * into
                full = full + trains.weights[0] * into + trains.weights[1] * out
                base[Operation.FULL, through, branch] = full
            first, last = (target in arch.targets for target in spec.targets)
            factors = _Factors(arch, trains, checkpointing, first, last)
            for operation in _ALL:
                for through in range(2):
                    where = operation, through, branch
                    near[where], far[where] = factors.flops(operation, through, adapted, outward)
        return cls(base, near, far)

    def per_slot(
        self, operations: np.ndarray, trains: Sequence[Trains], ranks: np.ndarray
    ) -> np.ndarray:
        """Return the FLOPs of an example in each slot of schedules: int64 [clients, slots].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            trains: What trains of each branch.
            ranks: Of heads that train, else 0: int64 [clients, blocks, heads].
        """
        run = BranchOperations.of(operations, trains)
        through = run.through[..., None].astype(np.int8)
        branch = np.arange(2, dtype=np.int8)[:, None]
        head = np.arange(operations.shape[-1])
        total = self.base[run.operations, through, branch, head].sum(axis=(2, 3, 4))
        if not self.far.any():
            return total
        rank = ranks[:, None, :, None]
        near = self.near[run.operations, through, branch, head] * rank
        total += near.sum(axis=(2, 3, 4))
        for operation in _ALL:
            does = ((run.operations == operation) * rank).max(axis=-1)
            far = self.far[operation][run.through.astype(np.int8), np.arange(2)]
            total += (does * far).sum(axis=(2, 3))
        return total

    def spared_at_the_bottom(self, trains: Sequence[Trains], rank: int) -> int:
        """Bound the FLOPs of an example that the lowest block that trains in a slot is spared.

        The comparison is with equal operations above another block that trains.

        Args:
            trains: What trains of each branch.
            rank: Of heads that train.
        """
        spared = []
        for operation in (Operation.FULL, Operation.FROZEN):  # of a head beside one that is FULL
            pair = np.array([[[Operation.FULL, operation]]], dtype=np.int8)
            run = BranchOperations.of(pair, trains)
            of_head = run.operations.reshape(2, 2)[:, 1]  # of the second, in both branches
            where = of_head, run.through.ravel().astype(np.int8), np.arange(2)
            lowest, higher = (
                (self.base[at] + rank * self.near[at]).sum(axis=0) for at in (where, (operation, 1))
            )
            spared.append(higher - lowest)
            if operation is Operation.FULL:
                common = rank * int((self.far[operation, 1] - self.far[where]).sum())
        return int(np.max(spared, axis=0).sum()) + common


@dataclass(frozen=True)
class _Factors:
    """FLOPs of LoRA's factors of one branch's products in and out."""

    arch: Architecture
    trains: Trains
    checkpointing: bool
    inward: bool
    outward: bool

    def flops(
        self, operation: Operation, through: int, rows_in: np.ndarray, rows_out: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Return the FLOPs per rank of each head's factors [heads], and of those that heads share.

        Args:
            operation: What heads do.
            through: Whether gradient goes on below.
            rows_in: Rows of each head of products in: int64 [heads].
            rows_out: Columns of each head of the product out: int64 [heads].
        """
        t, a = self.trains, self.arch
        live, full = operation >= Operation.FROZEN, operation is Operation.FULL
        through = through or operation is Operation.FROZEN
        deep = live and (through or t.inward)
        near_in = 1 + (deep and (through or (full and t.far[0]))) + (full and t.near[0])
        near_out = 1 + deep + (full and t.near[1])
        far_in = 1 + (live and through) + (full and t.far[0])
        far_out = 1 + (deep or (full and t.near[1])) + (full and t.far[1])
        if self.checkpointing and live:
            near_in, far_in = near_in + 1, far_in + 1
            near_out += full and (t.far[1] or a.lora_dropout > 0)
        unit = 2 * a.tokens
        near = unit * (self.inward * near_in * rows_in + self.outward * near_out * rows_out)
        return near, unit * a.dim * int(self.inward * far_in + self.outward * far_out)
