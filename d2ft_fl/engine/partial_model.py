"""A client's part of a model: only what is resident is held, only what runs is computed.

A pre-norm block is a sum over heads and feed-forward slices; a vision transformer's, for example,

    x <- x + b_proj + sum_h Attn_h(LN1(x)) W_proj[:, h]
    x <- x + b_fc2  + sum_h act(LN2(x) W_fc1[h]) W_fc2[:, h]

so the heads of an operation are a narrower attention and a narrower feed-forward layer, see
:mod:`d2ft_fl.engine.branch`. A block in which nothing runs is the identity, biases included, unless
it is compensated for what it would have added on average.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.engine.block import Block, Offsets
from d2ft_fl.engine.branch import Branch
from d2ft_fl.engine.model_adapter import Inputs, ModelAdapter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.run_branch import run_branch
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import Arrived, GlobalModel, down_spec
from d2ft_fl.subnets.schedule import BranchOperations, Schedule


@dataclass(frozen=True)
class Entry:
    """One optimiser entry: rows of a trained tensor that always step together.

    Attributes:
        block: Index of the block; -1 for the final part.
        heads: Whose rows they are; empty for whole parameters.
        kind: Of the parameter.
        factor: Whether it is one of LoRA's.
        value: The rows.
        grad: Their gradient.
    """

    block: int
    heads: tuple[int, ...]
    kind: Kind
    factor: bool
    value: Tensor
    grad: Tensor


class PartialModel:
    """A client's part of the model. Build once a process, :meth:`reset` once a round.

    In training, blocks see ``tokens`` tokens of each example; None is all.

    Args:
        adapter: Of the whole model, which stays as it is.
        arch: Its architecture, as it is tuned.
        numerics: Precision, and whether activations are kept or computed again.
        device: Where it runs.

    Raises:
        ConfigError: When the architecture has norms behind sums.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        arch: Architecture,
        numerics: Numerics | None = None,
        device: torch.device | str = "cpu",
    ):
        self.numerics = numerics or Numerics()
        self.tokens: int | None = None
        self.device = torch.device(device)
        if not all(branch.norm_first for branch in arch.branches):
            raise ConfigError(
                "the engine runs branches whose norm stands before the products, not behind the sum"
            )
        self.adapter = adapter
        self.traits = adapter.block_traits(self.device)
        self.outer = adapter.without_blocks().to(self.device)  # embedding and head
        self.tune(arch)
        self.train(False)

    def tune(self, arch: Architecture) -> None:
        """From now on, train what trains in ``arch``; nothing is held until the next reset."""
        self.arch = arch
        self._hold({})
        self.specs: list[dict[str, Parameter]] = [{} for _ in range(arch.blocks)]
        for p in arch.parameters:
            if p.block >= 0:
                self.specs[p.block][p.role] = p
        for name, parameter in self.outer.named_parameters():
            parameter.requires_grad_(arch.by_name[name].trains)
            parameter.grad = None

    def reset(
        self,
        schedule: Schedule,
        tensors: Mapping[str, Tensor] | GlobalModel,
        offsets: Mapping[int, Offsets] | None = None,
        gradients: bool = True,
    ) -> None:
        """Hold what ``schedule`` needs, with the values of ``tensors`` (see ``down_spec``).

        Args:
            schedule: What is to run.
            tensors: Slices of resident heads, packed, heads ascending, and whole tensors otherwise;
                or the whole model.
            offsets: Block -> compensation of what each slot skips.
            gradients: Whether there is room for gradients; without, an observer must take them.
        """
        whole = tensors if isinstance(tensors, GlobalModel) else None
        if whole and not offsets and self._fits_again(schedule, gradients):
            self._refill(whole)
            return
        self.schedule, self._gradients = schedule, gradients
        self._hold({})  # what was held goes before anything new comes
        named = whole.tensors if whole else tensors
        assert isinstance(named, Mapping)
        tensors = {
            name: named[name].to(self.device)
            for name in down_spec(self.arch, schedule)
            if not (whole and self.arch.by_name[name].kind is Kind.SLICED)
        }
        take = Arrived(tensors).take
        if whole:
            take = lambda p, heads: whole.take(p, heads).to(self.device)  # noqa: E731
        offsets = {
            block: [None if o is None else o.to(self.device) for o in of_block]
            for block, of_block in (offsets or {}).items()
        }
        with torch.no_grad():
            for name, parameter in self.outer.named_parameters():
                parameter.copy_(tensors[name])
                parameter.grad = None
        run = BranchOperations.of(schedule.operations, self.arch.trains)
        self._held_numerics = self.numerics
        blocks = {
            block: Block(
                self.arch,
                self.traits[block],
                self.specs[block],
                schedule,
                run,
                block,
                tensors,
                take,
                self.numerics,
                offsets.get(block),
                gradients,
            )
            for block in range(self.arch.blocks)
            if schedule.resident[block].any() or block in offsets
        }
        self._hold(blocks)
        self.train(self.training)

    def _hold(self, blocks: dict[int, Block]) -> None:
        """Replace the blocks; what is known of those before goes with them."""
        self.blocks = blocks
        self._entries: dict[bool, list[Entry]] = {}
        self._values: tuple[GlobalModel | None, list[Tensor], list[Tensor]] = (None, [], [])

    def let_go(self) -> None:
        """Keep no view of the model that values were taken from last."""
        self._values = (None, [], [])

    @torch.no_grad()
    def _refill(self, whole: GlobalModel) -> None:
        """Hold a model's values in place of those that are held.

        Gradients stay as they are: a step overwrites them, or finds them zeroed.
        """
        if self._values[0] is not whole:
            outer = self.outer.named_parameters()
            pairs: list[tuple[Tensor, Tensor]] = [(p, whole.tensors[name]) for name, p in outer]
            for block in self.blocks.values():
                pairs += block.values_of(whole)
            self._values = whole, [held for held, _ in pairs], [new for _, new in pairs]
        torch._foreach_copy_(*self._values[1:])

    def _fits_again(self, schedule: Schedule, gradients: bool) -> bool:
        """Whether what is held needs nothing but the values of another client's weights."""
        return (
            bool(self.blocks)
            and not self.arch.rank  # factors are merged into weights
            and gradients == self._gradients
            and self.numerics == self._held_numerics
            and np.array_equal(schedule.operations, self.schedule.operations)
            and not any(True for _ in self.compensated())
        )

    def train(self, training: bool) -> None:
        """Draw dropout and stochastic depth, or not."""
        self.training = training
        self.outer.train(training)
        for branch in self.branches():
            branch.training = training

    def compensated(self) -> Iterator[tuple[int, int]]:
        """Yield (block, slot) of what is compensated."""
        for index, block in self.blocks.items():
            for slot, offset in enumerate(block.branches[0].offsets):
                if offset is not None:
                    yield index, slot

    def settle(self, overwrite: bool) -> list[Tensor]:
        """Return gradients that must be zeroed before a step; see ``Branch.settle``."""
        whole = [t.grad for t in self.whole().values() if t.grad is not None]
        return whole + [g for branch in self.branches() for g in branch.settle(overwrite)]

    def branches(self) -> Iterator[Branch]:
        """Yield every branch of every block that the client has."""
        for block in self.blocks.values():
            yield from block.branches

    def __call__(self, inputs: Inputs, sizes: Sequence[int]) -> Tensor:
        """Return the logits of some examples: the first ``sizes[0]`` in slot 0, and so on.

        Args:
            inputs: See :meth:`ModelAdapter.embed`.
            sizes: Examples of each slot.
        """
        bounds = [0, *accumulate(sizes)]
        dtype, mixed = self.numerics.dtype, self.numerics.mixed
        autocast = torch.autocast(self.device.type, dtype, enabled=mixed)
        with autocast, torch.no_grad():
            kept = self.tokens if self.training else None
            x, context = self.adapter.embed(self.outer, inputs, kept)  # [examples, tokens, dim]
        for branch in self.branches():
            x = run_branch(branch, x, bounds, context)
        if torch.is_grad_enabled() and not x.requires_grad:
            # The classifier's backward pass is the same whether anything below it trains or not.
            x = x.requires_grad_()
        with autocast:
            features = self.adapter.features(self.outer, x, context)
            return self.adapter.logits(self.outer, features)

    # -- what is held ------------------------------------------------------------------------

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the round with a name, trained or not, gradients left out."""
        yield from self.outer.named_parameters()
        for index, block in self.blocks.items():
            yield from ((f"{index}.{role}", w) for role, w in block.store.weights.items())
            yield from ((f"{index}.{role}", w) for role, w in block.shared.items())
            for branch, b in enumerate(block.branches):
                for slot, offset in enumerate(b.offsets):
                    if offset is not None:
                        yield f"{index}.offset.{branch}.{slot}", offset

    def whole(self) -> dict[str, Tensor]:
        """Return whole tensors that train, by name: the final part and shared parameters."""
        tensors: dict[str, Tensor] = {}
        tensors |= {n: p for n, p in self.outer.named_parameters() if p.requires_grad}
        for index, block in self.blocks.items():
            for role, tensor in block.shared.items():
                if tensor.requires_grad:
                    tensors[self.specs[index][role].name] = tensor
        return tensors

    def gradients(self) -> list[Tensor]:
        """Return where gradients of trained tensors add up; made now for those that have none."""
        grads = []
        for tensor in self.whole().values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            grads.append(tensor.grad)
        for block in self.blocks.values():
            grads.extend(block.store.grads.values())
        return grads

    def entries(self, every_slot: bool = False) -> list[Entry]:
        """Return what an optimiser steps: views of exactly what trains; see ``Block.together``."""
        if every_slot in self._entries:
            return self._entries[every_slot]
        self.gradients()
        entries = self._entries[every_slot] = []
        for name, tensor in self.whole().items():
            p = self.arch.by_name[name]
            assert tensor.grad is not None
            # A view: what the optimiser is shown as its gradient is not autograd's business.
            factor = bool(p.factor)
            entries.append(Entry(p.block, (), p.kind, factor, tensor.detach(), tensor.grad))
        for index, block in self.blocks.items():
            for role, grad in block.store.grads.items():
                factor = ".lora_" in role
                for heads in block.together(every_slot):
                    (run,) = block.store.runs(role, heads)
                    value = block.store.weights[role][run.rows]
                    entries.append(Entry(index, heads, Kind.SLICED, factor, value, grad[run.rows]))
        return entries

    def update(self) -> dict[str, Tensor]:
        """Return everything that trained, by name and as it travels up (see ``up_spec``).

        These are no copies, where what trained lies as it travels.
        """
        tensors = {name: tensor.detach() for name, tensor in self.whole().items()}
        for index, block in self.blocks.items():
            for role in block.store.grads:
                tensors[self.specs[index][role].name] = block.store.ascending(role)
        return tensors
