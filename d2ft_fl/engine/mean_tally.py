"""Measures on a client what its subnets add on average."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ft_fl.engine.block import Offsets
from d2ft_fl.engine.head_group import HeadGroup
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire.compensation import mean_name, skip_name, skip_sets


class MeanTally:
    """A client's means of z over the examples that it runs, in one round."""

    def __init__(self, model: PartialModel):
        self.model = model
        self._roles = [branch.outward_weight for branch in model.arch.branches]
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.counts: dict[tuple[int, int], dict[int, int]] = {}
        for index, block in model.blocks.items():
            for branch, role in enumerate(self._roles):
                if role not in block.store.weights:
                    continue
                rows = len(block.store.weights[role])
                total = torch.zeros(model.arch.tokens, rows, device=model.device)
                self.sums[index, branch] = total
                self.counts[index, branch] = dict.fromkeys(block.store.order, 0)
                block.branches[branch].tally = self._tally(index, branch)

    def _tally(self, index: int, branch: int) -> "_Add":
        places = self.model.blocks[index].store
        return _Add(
            self.sums[index, branch], self.counts[index, branch], places.rows[self._roles[branch]]
        )

    def held(self) -> list[Tensor]:
        """Return the running sums."""
        return list(self.sums.values())

    def finish(self) -> dict[str, Tensor]:
        """Return the means, by name, heads ascending, and measure no more."""
        means = {}
        for (index, branch), total in self.sums.items():
            block = self.model.blocks[index]
            block.branches[branch].tally = None
            counts, rows = self.counts[index, branch], block.store.rows[self._roles[branch]]
            columns = [
                total[:, rows[head].start : rows[head].stop] / max(1, counts[head])
                for head in sorted(block.store.order)
            ]
            means[mean_name(index, branch)] = torch.cat(columns, dim=1).cpu()
        return means


@dataclass(frozen=True)
class _Add:
    """Adds a head group's z to the running sums of its heads."""

    total: Tensor
    counts: dict[int, int]
    rows: Mapping[int, range]

    def __call__(self, head_group: HeadGroup, z: Tensor) -> None:
        summed = z.sum(dim=0, dtype=torch.float32)  # [tokens, depth]
        start = 0
        for head in head_group.heads:
            columns = self.rows[head]
            self.total[:, columns.start : columns.stop] += summed[:, start : start + len(columns)]
            self.counts[head] += len(z)
            start += len(columns)


def received(schedule: Schedule, tensors: Mapping[str, Tensor]) -> dict[int, Offsets]:
    """Return compensation as it came down, per block and slot: see ``PartialModel.reset``."""
    offsets: dict[int, Offsets] = {}
    for block in range(schedule.operations.shape[1]):
        if (tensor := tensors.get(skip_name(block))) is not None:
            sets = skip_sets(schedule, block)
            offsets[block] = [None if place < 0 else tensor[place] for place in sets]
    return offsets
