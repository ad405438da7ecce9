"""Which slice of which parameter belongs to which subnet.

A subnet is attention head *h* of block *l* together with the *h*-th slice of that block's
feed-forward layer (D2FT, arXiv 2504.12471, section 3). A model has ``blocks x heads`` of them.

Slices of one parameter travel and train *packed*: the sliced axis first, rows grouped by head in
ascending order. A fused ``qkv`` weight ``[3 * heads * head_dim, dim]`` packs to rows
``q_h, k_h, v_h`` for each head; ``proj`` and ``fc2``, which are sliced on their input, are
transposed. A set of heads is then a set of row ranges, and a product with it is a narrower product.

What trains is a property of parameters: under LoRA (see :mod:`d2ft_fl.lora.config`) factors are
further parameters, and most others stay as they are. Where a schedule gives heads ranks of their
own, head h trains the first r_h columns of its factor F_h, and the block the first max_h r_h of the
common G. What travels up then is exactly that: of F one vector, head by head in ascending order,
each its rows of r_h; of G what is cut off at the largest rank.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.subnets.branches import BranchKind, BranchSpec, Trains


class Kind(Enum):
    """Whom a parameter belongs to."""

    EMBEDDING = "embedding"  # every client that runs anything needs it
    SHARED = "shared"  # of a block: needed, and trained, with any of its subnets
    SLICED = "sliced"  # divides over the block's subnets
    FINAL = "final"  # final norm and classifier; every client that runs anything needs it


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model, and how it divides over subnets.

    Attributes:
        name: Key in the model's state dict.
        shape: Its full shape.
        kind: How it takes part.
        role: For a block's parameters, the name within a block that the engine uses
            (``qkv.weight``, ``norm1.bias`` ...); empty otherwise.
        block: Index of its block, or -1.
        axis: The sliced axis, for ``Kind.SLICED``.
        rows: For ``Kind.SLICED``: per head, the indices along ``axis`` that it owns.
        trains: Whether clients train it.
        fixed: Whether it keeps its value over a run, so that a client that has it needs it no more.
        factor: ``A`` or ``B`` for a factor of a LoRA product, else empty.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    role: str = ""
    block: int = -1
    axis: int = 0
    rows: tuple[tuple[int, ...], ...] = ()
    trains: bool = True
    fixed: bool = False
    factor: str = ""

    def index(self, heads: Iterable[int]) -> Tensor:
        """Return indices along ``axis`` of some heads, in their order: int64 [rows], read only."""
        key = tuple(heads)
        if key not in self._indices:
            if len(self._indices) >= 256:
                self._indices.clear()
            rows = [row for head in key for row in self.rows[head]]
            self._indices[key] = torch.tensor(rows, dtype=torch.long)
        return self._indices[key]

    @cached_property
    def _indices(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def pack(self, tensor: Tensor, heads: Iterable[int]) -> Tensor:
        """Return the slices of ``heads``, sliced axis first, contiguous: [rows, ...]."""
        return tensor.index_select(self.axis, self.index(heads)).movedim(self.axis, 0).contiguous()

    def unpack_(self, tensor: Tensor, packed: Tensor, heads: Iterable[int]) -> None:
        """Write packed slices back into the full ``tensor``, in place."""
        tensor.index_copy_(self.axis, self.index(heads), packed.movedim(0, self.axis))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each head's rows begin among those of all heads; after the last, where they end."""
        return (0, *accumulate(len(rows) for rows in self.rows))

    def packed_shape(self, heads: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of :meth:`pack` for some heads."""
        rest = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return (sum(len(self.rows[head]) for head in heads), *rest)

    def cut(self, tensor: Tensor, rank: int) -> Tensor:
        """Return a view of a whole factor: the part of the first ``rank`` of its rank."""
        return tensor[:rank] if self.factor == "A" else tensor[:, :rank]

    def ranked_shape(self, ranks: Mapping[int, int]) -> tuple[int, ...]:
        """Return the shape in which a factor travels up that heads train at ranks: head -> rank."""
        if self.kind is Kind.SLICED:
            return (sum(len(self.rows[head]) * rank for head, rank in ranks.items()),)
        most = max(ranks.values())
        return (most, self.shape[1]) if self.factor == "A" else (self.shape[0], most)

    @cached_property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @cached_property
    def row_width(self) -> int:
        """How many elements a row of its slices has."""
        return self.numel // self.shape[self.axis]


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, as far as planning, costs and aggregation need to know it.

    Attributes:
        blocks: Blocks, which are alike.
        heads: Subnets of a block. Of attention in which queries share keys and values, a subnet is
            such a group.
        dim: Width of the residual stream.
        tokens: Tokens of one example, prefix tokens included.
        prefix: How many of them must always be there: no patches, no text.
        classes: Outputs of the last linear layer.
        branches: What a block consists of, in the order in which it runs.
        classifier: Module of the last linear layer, which trains under LoRA too.
        rms: Whether norms are by root mean square, instead of LayerNorm.
        output_dropout: Probability of dropout on the sum of a branch's heads.
        drop_path: Probability of stochastic depth, in the block where it is most.
        embed_flops: FLOPs of embedding one example (frozen: forward only).
        input_elements: Elements of one example's input.
        norm_pooled: True when the final norm sees pooled tokens, False when it sees all of them.
        parameters: Every parameter of the model, LoRA's factors included.
        rank: Of LoRA: a product is ``W + scaling * B A`` with A of shape [rank, in] and B
            [out, rank]; 0 for none.
        scaling: Of LoRA, see ``rank``.
        lora_dropout: Probability of dropout on what goes into A.
    """

    blocks: int
    heads: int
    dim: int
    tokens: int
    prefix: int
    classes: int
    branches: tuple[BranchSpec, ...]
    classifier: str
    rms: bool
    output_dropout: float
    drop_path: float
    embed_flops: int
    input_elements: int
    norm_pooled: bool
    parameters: tuple[Parameter, ...]
    rank: int = 0
    scaling: float = 0.0
    lora_dropout: float = 0.0

    def __hash__(self) -> int:
        # Enough to tell models apart, and quick beside thousands of rows.
        return hash((self.blocks, self.heads, self.dim, self.widths, self.tokens, self.rank))

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """Parameters by state-dict name."""
        return {p.name: p for p in self.parameters}

    @cached_property
    def subnet_sizes(self) -> np.ndarray:
        """Parameters of each subnet, factors left out: int64 [blocks, heads]; may be uneven."""
        return self.sliced_sizes(lambda p: not p.factor)

    def sliced_sizes(self, which: Callable[[Parameter], bool]) -> np.ndarray:
        """Return elements of each subnet's slices of some parameters: int64 [blocks, heads]."""
        sizes = np.zeros((self.blocks, self.heads), dtype=np.int64)
        for p in filter(which, self.of_kind(Kind.SLICED)):
            width = p.row_width
            sizes[p.block] += [width * len(rows) for rows in p.rows]
        return sizes

    def shared_sizes(self, which: Callable[[Parameter], bool]) -> np.ndarray:
        """Return elements of some shared parameters of each block: int64 [blocks]."""
        sizes = np.zeros(self.blocks, dtype=np.int64)
        for p in filter(which, self.of_kind(Kind.SHARED)):
            sizes[p.block] += p.numel
        return sizes

    @cached_property
    def trains(self) -> tuple[Trains, ...]:
        """What of each branch trains where a subnet is FULL."""
        roles = {p.role for p in self.parameters if p.block == 0 and p.trains}
        return tuple(Trains.of(roles, branch) for branch in self.branches)

    @cached_property
    def targets(self) -> frozenset[str]:
        """The products that have LoRA's factors."""
        return frozenset(p.role.split(".")[0] for p in self.parameters if p.factor)

    @cached_property
    def possible_targets(self) -> tuple[str, ...]:
        """The products that may have LoRA's factors, in the order in which a block runs them."""
        return tuple(target for branch in self.branches for target in branch.targets)

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Columns that each head hands to the product out, of each branch: [branches][heads]."""
        return tuple(branch.widths for branch in self.branches)

    @property
    def attention(self) -> BranchSpec:
        """The branch that attends."""
        return next(b for b in self.branches if b.kind is BranchKind.ATTENTION)

    def rows_in(self, branch: int) -> dict[str, np.ndarray]:
        """Return rows of each head of a branch's products in: product -> int64 [heads]."""
        first = {p.role: p for p in self.parameters if p.block == 0}
        return {
            product: np.array([len(rows) for rows in first[f"{product}.weight"].rows])
            for product in self.branches[branch].inward
        }

    def without_dropout(self) -> "Architecture":
        """Return the architecture of the model in evaluation: nothing is dropped."""
        branches = tuple(replace(branch, dropout=0.0) for branch in self.branches)
        return replace(self, branches=branches, output_dropout=0.0, drop_path=0.0)

    def is_classifier(self, p: Parameter) -> bool:
        """Whether a parameter is one of the last linear layer."""
        return p.name.startswith(f"{self.classifier}.")

    def of_kind(self, kind: Kind, block: int | None = None) -> list[Parameter]:
        """Return parameters of one kind, of one block or of all."""
        return [p for p in self.parameters if p.kind is kind and block in (None, p.block)]


def has_fixed(arch: Architecture) -> bool:
    """Whether anything never changes."""
    return any(p.fixed for p in arch.parameters)
