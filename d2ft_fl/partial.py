"""The modules that run a schedule: only what is resident is held, only what runs is computed.

A pre-norm block is a sum over heads and feed-forward slices,

    x <- x + b_proj + sum_h Attn_h(LN1(x)) W_proj[:, h]
    x <- x + b_fc2  + sum_h act(LN2(x) W_fc1[h]) W_fc2[:, h]

so the heads that run FULL are gathered into one narrower attention (and one narrower feed-forward
layer) that autograd sees, the heads that run FORWARD_ONLY into another that runs without a graph,
and a SHORTCUT costs nothing. A block in which nothing runs is the identity, biases included.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl import timm_vit
from d2ft_fl.subnets import Architecture, Kind, Operation, Parameter, Schedule
from d2ft_fl.timm_vit import BlockTraits, VisionTransformer

Weights = dict[str, Tensor]
Product = Callable[[Tensor, Weights, Tensor | None], Tensor]


@dataclass(frozen=True)
class Branch:
    """The roles of one of a block's two residual branches."""

    norm: str
    roles: tuple[str, ...]
    bias: str
    scale: str


ATTENTION = Branch("norm1", ("qkv.weight", "qkv.bias", "proj.weight"), "proj.bias", "ls1.gamma")
FEED_FORWARD = Branch("norm2", ("fc1.weight", "fc1.bias", "fc2.weight"), "fc2.bias", "ls2.gamma")


class PackedHeads:
    """Packed slices of some heads of one block: role -> rows grouped by head, ascending."""

    def __init__(self, heads: tuple[int, ...], weights: Weights, specs: Mapping[str, Parameter]):
        self.heads = heads
        self.weights = weights
        # role -> head -> its rows within the packed tensor
        self.rows: dict[str, dict[int, range]] = {}
        for role in weights:
            start, runs = 0, {}
            for head in heads:
                stop = start + len(specs[role].rows[head])
                runs[head] = range(start, stop)
                start = stop
            self.rows[role] = runs

    def index(self, role: str, heads: tuple[int, ...]) -> Tensor:
        """Rows of some of the heads, in their order: int64 [rows]."""
        return torch.tensor([row for h in heads for row in self.rows[role][h]], dtype=torch.long)


class Gather:
    """A choice of heads out of some packed ones, with its row indices made once a round."""

    def __init__(self, source: PackedHeads, heads: tuple[int, ...]):
        self.source = source
        self.index: Weights | None = None
        if heads != source.heads:
            self.index = {role: source.index(role, heads) for role in source.weights}

    def __call__(self, roles: tuple[str, ...]) -> Weights:
        """The chosen heads' weights: the stored ones where all are chosen, else a copy."""
        stored = {role: w for role, w in self.source.weights.items() if role in roles}
        if self.index is None:
            return stored
        return {role: w.index_select(0, self.index[role]) for role, w in stored.items()}


class Block:
    """One transformer block as far as a client holds it."""

    def __init__(
        self,
        traits: BlockTraits,
        specs: Mapping[str, Parameter],
        schedule: Schedule,
        block: int,
        tensors: Mapping[str, Tensor],
        head_dim: int,
    ):
        self.head_dim = head_dim
        self.act = traits.activation
        trained = schedule.heads(schedule.trained, block)
        resident = schedule.heads(schedule.resident, block)
        sliced = {r: p for r, p in specs.items() if p.kind is Kind.SLICED}
        held = PackedHeads(resident, {r: tensors[p.name] for r, p in sliced.items()}, sliced)

        def keep(heads: tuple[int, ...], trains: bool) -> PackedHeads:
            rows = {role: held.weights[role][held.index(role, heads)] for role in sliced}
            for weight in rows.values():
                weight.requires_grad_(trains)
            return PackedHeads(heads, rows, sliced)

        self.trained = keep(trained, trains=True)
        self.frozen = keep(tuple(h for h in resident if h not in trained), trains=False)
        self.shared = {
            role: tensors[p.name].clone().requires_grad_(bool(trained))
            for role, p in specs.items()
            if p.kind is Kind.SHARED
        }
        self.norm_eps = {"norm1": traits.epsilon1, "norm2": traits.epsilon2}
        self.slots = [self._groups(schedule, slot, block) for slot in range(schedule.slots)]

    def _groups(self, schedule: Schedule, slot: int, block: int) -> tuple[list[Gather], ...]:
        """What runs in one slot: the FULL gathers and the FORWARD_ONLY gathers."""
        operations = schedule.operations[slot]
        full = schedule.heads(operations == Operation.FULL, block)
        forward = schedule.heads(operations == Operation.FORWARD_ONLY, block)
        parts = [
            (store, tuple(h for h in forward if h in store.heads))
            for store in (self.trained, self.frozen)
        ]
        return (
            [Gather(self.trained, full)] if full else [],
            [Gather(store, heads) for store, heads in parts if heads],
        )

    def __call__(self, x: Tensor, slot: int) -> Tensor:
        """The block's output for one slot: [batch, tokens, dim]."""
        full, forward = self.slots[slot]
        if not full and not forward:
            return x
        x = self._branch(x, slot, ATTENTION, self._attention)
        return self._branch(x, slot, FEED_FORWARD, self._mlp)

    def _branch(self, x: Tensor, slot: int, names: "Branch", product: Product) -> Tensor:
        """One residual branch: the sum over what runs, its bias and scale applied once.

        Gradient flows exactly where something runs FULL; elsewhere the branch is a constant.
        """
        full, silent = self.slots[slot]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(full)):
            y = self._norm(x if full else x.detach(), names.norm)  # [batch, tokens, dim]
            bias, out = self.shared.get(names.bias), None
            for gather in full:
                out, bias = product(y, gather(names.roles), bias), None
            with torch.no_grad():
                for gather in silent:
                    part = product(y.detach(), gather(names.roles), bias)
                    out, bias = part if out is None else out.add_(part), None
            assert out is not None
            if names.scale in self.shared:
                out = out * self.shared[names.scale]
        return x + out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.shared[f"{name}.weight"], self.shared.get(f"{name}.bias")
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.norm_eps[name])

    def _attention(self, y: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        batch, tokens, _ = y.shape
        qkv = F.linear(y, w["qkv.weight"], w.get("qkv.bias"))  # [batch, tokens, heads*3*head_dim]
        qkv = qkv.view(batch, tokens, -1, 3, self.head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each [batch, heads, tokens, head_dim]
        out = F.scaled_dot_product_attention(q, k, v)  # [batch, heads, tokens, head_dim]
        out = out.transpose(1, 2).reshape(batch, tokens, -1)  # [batch, tokens, heads*head_dim]
        return F.linear(out, w["proj.weight"].t(), bias)  # [batch, tokens, dim]

    def _mlp(self, y: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        hidden = self.act(F.linear(y, w["fc1.weight"], w.get("fc1.bias")))  # [.., hidden]
        return F.linear(hidden, w["fc2.weight"].t(), bias)  # [batch, tokens, dim]


class PartialModel:
    """A client's part of the model. Build once a process, :meth:`reset` once a round.

    Args:
        model: The whole timm model, used as a template: its blocks' weights are dropped.
        arch: Its architecture.
    """

    def __init__(self, model: VisionTransformer, arch: Architecture):
        self.arch = arch
        self.traits = timm_vit.block_traits(model)
        self.outer = timm_vit.without_blocks(model)  # embedding and classifier
        self.blocks: dict[int, Block] = {}
        self.specs: list[dict[str, Parameter]] = [{} for _ in range(arch.blocks)]
        for p in arch.parameters:
            if p.block >= 0:
                self.specs[p.block][p.role] = p

    def reset(self, schedule: Schedule, tensors: Mapping[str, Tensor]) -> None:
        """Hold what ``schedule`` needs, with the values of ``tensors`` (see ``down_spec``)."""
        self.schedule = schedule
        with torch.no_grad():
            for name, parameter in self.outer.named_parameters():
                parameter.copy_(tensors[name])
                parameter.grad = None
        self.blocks = {
            block: Block(
                self.traits[block],
                self.specs[block],
                schedule,
                block,
                tensors,
                self.arch.head_dim,
            )
            for block in range(self.arch.blocks)
            if schedule.resident[block].any()
        }

    def __call__(self, images: Tensor, slot: int) -> Tensor:
        """Logits [batch, classes] of ``images`` under the operations of ``slot``."""
        with torch.no_grad():
            x = timm_vit.embed(self.outer, images)  # [batch, tokens, dim]
        for block in self.blocks.values():
            x = block(x, slot)
        return timm_vit.classify(self.outer, x)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held for the round, trained or not."""
        yield from self.outer.named_parameters()
        for index, block in self.blocks.items():
            for part, weights in (
                ("trained", block.trained.weights),
                ("frozen", block.frozen.weights),
                ("shared", block.shared),
            ):
                yield from ((f"{index}.{part}.{role}", w) for role, w in weights.items())

    def final(self) -> dict[str, Tensor]:
        """Final norm and classifier, by name."""
        return {n: p for n, p in self.outer.named_parameters() if p.requires_grad}

    def shared(self) -> dict[str, Tensor]:
        """Shared parameters that train, by name."""
        return {
            self.specs[index][role].name: w
            for index, block in self.blocks.items()
            for role, w in block.shared.items()
            if w.requires_grad
        }

    def sliced(self) -> dict[str, Tensor]:
        """Packed trained slices, by name: the layout in which they travel up."""
        return {
            self.specs[index][role].name: w
            for index, block in self.blocks.items()
            if block.trained.heads
            for role, w in block.trained.weights.items()
        }

    def rows(self, name: str) -> dict[int, range]:
        """Head -> its rows in the packed tensor ``name`` of :meth:`sliced`."""
        p = self.arch.by_name[name]
        return self.blocks[p.block].trained.rows[p.role]

    def trainable(self) -> dict[str, Tensor]:
        """Everything that trains and travels up, by name (see ``up_spec``)."""
        return {**self.final(), **self.shared(), **self.sliced()}
