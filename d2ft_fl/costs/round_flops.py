"""FLOPs of rounds: every example's, and the merging of LoRA's factors.

:mod:`d2ft_fl.costs.flops` has those of an example, branch by branch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.flops import BranchFlops
from d2ft_fl.costs.round_memory import active_slots, sizes_of_slots
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Operation, residents, slot_sizes


@dataclass(frozen=True, eq=False)
class RoundFlops:
    """FLOPs of clients' rounds.

    Attributes:
        arch: The architecture, with as many tokens as blocks see.
        options: How clients train.
        slots: Slots of schedules.
        fused: Whether attention is torch's fused one.
    """

    arch: Architecture
    options: TrainingOptions
    slots: int
    fused: bool

    @cached_property
    def by_branch(self) -> BranchFlops:
        """FLOPs of operations, by branch."""
        return BranchFlops.of(self.arch, self.fused, self.options.checkpointing)

    @cached_property
    def of_operations(self) -> np.ndarray:
        """FLOPs of each operation of each head on one example, at most: int64 [operations, heads].

        A FULL subnet pays most where something below it trains. What a block pays besides is in
        :attr:`of_blocks`.
        """
        total = self.by_branch.base[:, 1].sum(axis=1)
        near = self.by_branch.near[Operation.FULL, 1].sum(axis=0)
        total[Operation.FULL] += self.arch.rank * near
        return total

    @cached_property
    def of_blocks(self) -> np.ndarray:
        """FLOPs of LoRA's factors that a block's heads share: int64 [operations]; 0 without LoRA.

        They are for one example, at most, and per rank of the largest that trains.
        """
        return self.by_branch.far[:, 1].sum(axis=1)

    @property
    def outside(self) -> int:
        """FLOPs of one example outside the blocks: embedding forward, classifier forth and back."""
        return self.arch.embed_flops + 6 * self.arch.dim * self.arch.classes

    @cached_property
    def of_merging(self) -> np.ndarray:
        """FLOPs of merging a subnet's factors into its weights, per rank: int64 [blocks, heads]."""
        roles = {f"{target}.weight" for target in self.arch.targets}
        return 2 * self.arch.sliced_sizes(lambda p: p.role in roles and not p.factor)

    def of(self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the FLOPs of many clients' rounds: int64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
        """
        per_slot = self.by_branch.per_slot(operations, self.arch.trains, ranks)
        per_slot += self.outside * active_slots(operations)  # [clients, slots]
        full, rest = np.divmod(examples, self.options.batch_size)
        whole = np.array(slot_sizes(self.options.batch_size, self.slots))
        totals = full[:, None] * whole + sizes_of_slots(rest, self.slots)
        flops = self.options.epochs * (per_slot * totals).sum(axis=1)
        if self.arch.rank:
            merged = residents(operations) * (self.arch.rank - ranks)
            flops += (merged * self.of_merging).sum(axis=(1, 2))
        return flops
