"""One block of a client's partial model: its packed slices, shared parameters and branches."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.grouping import storage_order
from d2ft_fl.engine.model_adapter import BlockTraits
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import ProductFactors, branch_factors
from d2ft_fl.engine.segments import segments
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import GlobalModel, Take
from d2ft_fl.subnets.schedule import BranchOperations, Operation, Schedule

# Means of what a block's skipped subnets would add, per slot: [branches, tokens, dim] or None.
Offsets = list[Tensor | None]


class Block:
    """One block as far as a client has it.

    Args:
        arch: As it is tuned.
        traits: What the block computes with.
        specs: Role -> parameter of the block.
        schedule: What the client runs.
        run: Its operations by branch.
        block: Index of the block.
        tensors: Shared parameters by name.
        take: Makes rows of sliced ones.
        numerics: How arithmetic is done.
        offsets: Per slot, compensation of what is skipped.
        gradients: Whether there is room for gradients.
    """

    def __init__(
        self,
        arch: Architecture,
        traits: BlockTraits,
        specs: Mapping[str, Parameter],
        schedule: Schedule,
        run: BranchOperations,
        block: int,
        tensors: Mapping[str, Tensor],
        take: Take,
        numerics: Numerics,
        offsets: Offsets | None,
        gradients: bool,
    ):
        operations = schedule.effective[:, block]  # [slots, heads]
        trained = schedule.trained[block]
        sliced = {r: p for r, p in specs.items() if p.kind is Kind.SLICED}
        ranks = schedule.trained_ranks(block)
        order = storage_order(operations, ranks)
        self.store = PackedHeads(order, int(trained.sum()), take, sliced, gradients, ranks)
        self.shared = {
            role: tensors[p.name].clone().requires_grad_(bool(trained.any()) and p.trains)
            for role, p in specs.items()
            if p.kind is Kind.SHARED and order
        }
        self.operations = operations
        self.specs = specs
        self.branches = []
        for index, (spec, of_block) in enumerate(zip(arch.branches, traits, strict=True)):
            trains = arch.trains[index]
            targets = [
                target for target in arch.targets if f"{target}.weight" in self.store.weights
            ]
            factors = branch_factors(spec, trains, targets, arch.scaling, arch.lora_dropout)
            self._merge_factors(factors.values(), ranks, keeps=bool(trained.any()))
            branch_segments = segments(
                self.store,
                spec.inward,
                spec.outward,
                run.operations[:, block, index],
                run.through[:, block, index],
                factors if trained.any() else {},
            )
            skipped = [None if o is None else o[index] for o in offsets or [None] * schedule.slots]
            args = self.store, self.shared, branch_segments, trains, factors, numerics, skipped
            self.branches.append(Branch(spec, of_block, *args))

    def _merge_factors(
        self, factors: Iterable[ProductFactors], ranks: Mapping[int, int] | None, keeps: bool
    ) -> None:
        """Add to weights the factors of heads that do not train; drop what no head needs then.

        Args:
            factors: Of the products of one branch.
            ranks: Trained heads -> how much of their factors trains, where it is not all.
            keeps: Whether anything trains.
        """
        for lora in factors:
            target, _, factor = lora.far.partition(".")
            far = self.shared[lora.far].detach()
            far = far.t() if factor == "lora_A" else far  # [dim, rank]
            self.store.merge(target, lora.near, far, lora.scaling)
            if not keeps:
                del self.shared[lora.far], self.store.weights[lora.near]
            elif ranks is not None:
                spec, whole = self.specs[lora.far], self.shared[lora.far]
                part = spec.cut(whole.detach(), max(ranks.values())).clone()
                self.shared[lora.far] = part.requires_grad_(whole.requires_grad)

    def values_of(self, whole: GlobalModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of what the block has, each with its counterpart in a whole model."""
        for role, rows in self.store.weights.items():
            parts = list(whole.parts(self.specs[role], self.store.order))
            yield from zip(rows.split([len(part) for part in parts]), parts, strict=True)
        for role, tensor in self.shared.items():
            yield tensor, whole.tensors[self.specs[role].name]

    def together(self, every_slot: bool) -> list[tuple[int, ...]]:
        """Return trained heads, those that always step together in one tuple.

        Args:
            every_slot: Whether every batch has examples in every slot; otherwise heads must run
                FULL in the same slots.
        """
        if every_slot:
            return [self.store.trained] if self.store.trained else []
        groups: list[tuple[int, ...]] = []
        full = self.operations == Operation.FULL
        for head in self.store.trained:
            if groups and (full[:, groups[-1][-1]] == full[:, head]).all():
                groups[-1] = (*groups[-1], head)
            else:
                groups.append((head,))
        return groups
