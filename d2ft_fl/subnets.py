"""Which slice of which parameter belongs to which subnet.

A subnet is attention head *h* of block *l* together with the *h*-th slice of that block's
feed-forward layer (D2FT, arXiv 2504.12471, section 3). A model has ``blocks x heads`` of them.

Slices of one parameter travel and train *packed*: the sliced axis first, rows grouped by head in
ascending order. A fused ``qkv`` weight ``[3 * heads * head_dim, dim]`` packs to rows
``q_h, k_h, v_h`` for each head; ``proj`` and ``fc2``, which are sliced on their input, are
transposed. A set of heads is then a set of row ranges, and a product with it is a narrower product.

What trains is a property of parameters: under LoRA (see :mod:`d2ft_fl.lora`) factors are further
parameters, and most others stay as they are. Where a schedule gives heads ranks of their own, head
h trains the first r_h columns of its factor F_h, and the block the first max_h r_h of the common G.
What travels up then is exactly that: of F one vector, head by head in ascending order, each its
rows of r_h; of G what is cut off at the largest rank.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.errors import ConfigError


class Operation(IntEnum):
    """What a subnet does for the examples of one slot, in ascending cost.

    D2FT's p_s, p_o and p_f, and FROZEN: gradient passes through it, but its weights get none.
    """

    SHORTCUT = 0
    FORWARD_ONLY = 1
    FROZEN = 2
    FULL = 3


class Kind(Enum):
    """Whom a parameter belongs to."""

    EMBEDDING = "embedding"  # every client that runs anything needs it
    SHARED = "shared"  # of a block: needed, and trained, with any of its subnets
    SLICED = "sliced"  # divides over the block's subnets
    FINAL = "final"  # final norm and classifier; every client that runs anything needs it


@dataclass(frozen=True)
class BranchRoles:
    """Names, within a block, of what a branch consists of; see :class:`Parameter` for roles."""

    norm: str
    inward: tuple[str, ...]
    middle: tuple[str, ...]
    outward: str
    scale: str

    def owns(self, role: str) -> bool:
        """Whether a parameter of this role is the branch's."""
        named = (self.norm, *self.inward, *self.middle, self.outward, self.scale)
        return role.split(".")[0] in named


BRANCHES = (
    BranchRoles("norm1", ("qkv", "gate"), ("q_norm", "k_norm"), "proj", "ls1"),
    BranchRoles("norm2", ("fc1",), (), "fc2", "ls2"),
)


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
        """Indices along ``axis`` of the given heads, in their order: int64 [rows], read only."""
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
        """The slices of ``heads``, sliced axis first, contiguous: [rows, ...]."""
        return tensor.index_select(self.axis, self.index(heads)).movedim(self.axis, 0).contiguous()

    def unpack_(self, tensor: Tensor, packed: Tensor, heads: Iterable[int]) -> None:
        """Write packed slices back into the full ``tensor``, in place."""
        tensor.index_copy_(self.axis, self.index(heads), packed.movedim(0, self.axis))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each head's rows begin among those of all heads; after the last, where they end."""
        return (0, *accumulate(len(rows) for rows in self.rows))

    def packed_shape(self, heads: Sequence[int]) -> tuple[int, ...]:
        """Shape of :meth:`pack` for these heads."""
        rest = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return (sum(len(self.rows[head]) for head in heads), *rest)

    def cut(self, tensor: Tensor, rank: int) -> Tensor:
        """Of a whole factor, what belongs to the first ``rank`` of its rank: a view."""
        return tensor[:rank] if self.factor == "A" else tensor[:, :rank]

    def ranked_shape(self, ranks: Mapping[int, int]) -> tuple[int, ...]:
        """Shape in which a factor travels up that heads train at these ranks: head -> rank."""
        if self.kind is Kind.SLICED:
            return (sum(len(self.rows[head]) * rank for head, rank in ranks.items()),)
        most = max(ranks.values())
        return (most, self.shape[1]) if self.factor == "A" else (self.shape[0], most)

    @property
    def numel(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, as far as planning, costs and aggregation need to know it.

    Attributes:
        blocks, heads: The grid of subnets.
        dim: Width of the residual stream.
        head_dim: Width of one attention head.
        hidden: Width of each head's feed-forward slice, ``[heads]``.
        tokens: Tokens of one example, prefix tokens included.
        prefix: How many of them are no patches.
        classes: Outputs of the classifier.
        layer_scale: Whether branches are scaled before they are added.
        rms: Whether blocks are normed by root mean square, instead of LayerNorm.
        gated: Whether attention outputs are gated. head_norms: Of queries and keys, how many.
        attention_dropout, hidden_dropout, output_dropout: Probabilities in training.
        drop_path: Of stochastic depth, in the block where it is most.
        embed_flops: FLOPs of embedding one example (frozen: forward only).
        input_elements: Elements of one input image.
        norm_pooled: True when the final norm sees pooled tokens, False when it sees all of them.
        parameters: Every parameter of the model, LoRA's factors included.
        rank, scaling, lora_dropout: Of LoRA: a product is ``W + scaling * B A``, with A of shape
            [rank, in] and B [out, rank], and its input is dropped out for A; rank 0 for none.
    """

    blocks: int
    heads: int
    dim: int
    head_dim: int
    hidden: tuple[int, ...]
    tokens: int
    prefix: int
    classes: int
    layer_scale: bool
    rms: bool
    gated: bool
    head_norms: int
    attention_dropout: float
    hidden_dropout: float
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
        return hash((self.blocks, self.heads, self.dim, self.hidden, self.tokens, self.rank))

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """Parameters by state-dict name."""
        return {p.name: p for p in self.parameters}

    @cached_property
    def subnet_sizes(self) -> np.ndarray:
        """Parameters of each subnet, factors left out: int64 [blocks, heads]; may be uneven."""
        return self.sliced_sizes(lambda p: not p.factor)

    def sliced_sizes(self, which: Callable[[Parameter], bool]) -> np.ndarray:
        """Elements of each subnet's slices of some parameters: int64 [blocks, heads]."""
        sizes = np.zeros((self.blocks, self.heads), dtype=np.int64)
        for p in filter(which, self.of_kind(Kind.SLICED)):
            width = p.numel // p.shape[p.axis]
            sizes[p.block] += [width * len(rows) for rows in p.rows]
        return sizes

    def shared_sizes(self, which: Callable[[Parameter], bool]) -> np.ndarray:
        """Elements of some shared parameters of each block: int64 [blocks]."""
        sizes = np.zeros(self.blocks, dtype=np.int64)
        for p in filter(which, self.of_kind(Kind.SHARED)):
            sizes[p.block] += p.numel
        return sizes

    @cached_property
    def trains(self) -> "tuple[Trains, ...]":
        """What of each of a block's branches trains where a subnet is FULL; blocks are alike."""
        roles = {p.role for p in self.parameters if p.block == 0 and p.trains}
        return tuple(Trains.of(roles, branch) for branch in BRANCHES)

    @cached_property
    def targets(self) -> frozenset[str]:
        """The products that have LoRA's factors."""
        return frozenset(p.role.split(".")[0] for p in self.parameters if p.factor)

    @property
    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Width of what each head hands to the product out, of attention and feed-forward."""
        return (self.head_dim,) * self.heads, self.hidden

    def of_kind(self, kind: Kind, block: int | None = None) -> list[Parameter]:
        """Parameters of one kind, of one block or of all."""
        return [p for p in self.parameters if p.kind is kind and block in (None, p.block)]


@dataclass(frozen=True)
class Trains:
    """What of a branch trains where one of its subnets is FULL.

    Attributes:
        anything: Any parameter of the branch.
        norm: Its norm; else gradient is wanted at its input for lower branches alone.
        scale: Its layer scale.
        inward: Anything between norm and product out.
        y, z: Whether a gradient is a product with what goes into the products in, or out.
        weights: Whether the weights of the products (in, out) train.
        near, far: Of LoRA's factors, whether F and G train, of the products (in, out) each; see
            :mod:`d2ft_fl.lora`.
    """

    anything: bool
    norm: bool
    scale: bool
    inward: bool
    y: bool
    z: bool
    weights: tuple[bool, bool]
    near: tuple[bool, bool]
    far: tuple[bool, bool]

    @classmethod
    def of(cls, roles: set[str], branch: BranchRoles) -> "Trains":
        """By the roles of a block that train."""
        own = {role for role in roles if branch.owns(role)}
        first = {role.split(".")[0] for role in own}
        into = [f"{r}.{part}" for r in branch.inward for part in ("weight", "lora_A")]
        out = [f"{branch.outward}.{part}" for part in ("weight", "lora_A")]
        return cls(
            anything=bool(own),
            norm=branch.norm in first,
            scale=branch.scale in first,
            inward=bool(first & {*branch.inward, *branch.middle}),
            y=bool(own & set(into)),
            z=bool(own & set(out)),
            weights=(f"{branch.inward[0]}.weight" in own, f"{branch.outward}.weight" in own),
            near=(f"{branch.inward[0]}.lora_B" in own, f"{branch.outward}.lora_A" in own),
            far=(f"{branch.inward[0]}.lora_A" in own, f"{branch.outward}.lora_B" in own),
        )


@dataclass(frozen=True)
class BranchOperations:
    """Schedules as branches run them.

    Attributes:
        operations: int8 [..., slots, blocks, 2, heads]: FROZEN only where gradient passes, FULL
            only where something trains.
        through: bool [..., slots, blocks, 2]: whether gradient is wanted at the branch's input.
    """

    operations: np.ndarray
    through: np.ndarray

    @classmethod
    def of(cls, operations: np.ndarray, trains: Sequence[Trains]) -> "BranchOperations":
        """Of schedules int8 [..., slots, blocks, heads]."""
        anything = np.array([t.anything for t in trains])
        norm = np.array([t.norm for t in trains])
        each = np.repeat(operations[..., None, :], len(trains), axis=-2)
        full = (each == Operation.FULL) & anything[:, None]
        own = full.any(axis=-1)  # [..., slots, blocks, 2]
        flat = own.reshape(*own.shape[:-2], -1)
        begun = np.logical_or.accumulate(flat, axis=-1)
        below = np.zeros_like(begun)
        below[..., 1:] = begun[..., :-1]
        through = below.reshape(own.shape) | (own & norm)
        live = (each >= Operation.FROZEN) & ~full
        passes = np.where(through[..., None], Operation.FROZEN, Operation.FORWARD_ONLY)
        return cls(np.where(live, passes, each).astype(np.int8), through)


@dataclass(frozen=True, eq=False)
class Schedule:
    """One client's operations for a round: int8 ``[slots, blocks, heads]`` of ``Operation``.

    Attributes:
        operations: See above.
        ranks: int64 [blocks, heads], the rank at which trained subnets train LoRA's factors; None
            for the architecture's own. Of subnets that do not train it means nothing.
    """

    operations: np.ndarray
    ranks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.operations.ndim != 3 or self.operations.dtype != np.int8:
            raise ConfigError(
                f"a schedule is int8 [slots, blocks, heads], not {self.operations.dtype} "
                f"{list(self.operations.shape)}"
            )
        low, high = int(self.operations.min(initial=0)), int(self.operations.max(initial=0))
        if low < 0 or high > max(Operation):
            raise ConfigError(f"operations are 0 to {max(Operation)}, not {low} to {high}")
        if self.ranks is not None and (
            self.ranks.dtype != np.int64 or self.ranks.shape != self.operations.shape[1:]
        ):
            raise ConfigError(
                f"ranks are int64 [blocks, heads], not {self.ranks.dtype} {list(self.ranks.shape)}"
            )

    @classmethod
    def filled(cls, operation: Operation, slots: int, blocks: int, heads: int) -> "Schedule":
        """Every subnet does the same in every slot."""
        return cls(np.full((slots, blocks, heads), operation, dtype=np.int8))

    @property
    def slots(self) -> int:
        """Micro-batches of a batch."""
        return int(self.operations.shape[0])

    @cached_property
    def resident(self) -> np.ndarray:
        """Subnets that any slot runs: bool [blocks, heads]. Only these travel down."""
        return (self.operations != Operation.SHORTCUT).any(axis=0)

    @cached_property
    def trained(self) -> np.ndarray:
        """Subnets that any slot runs FULL: bool [blocks, heads]. Only these travel up."""
        return (self.operations == Operation.FULL).any(axis=0)

    @cached_property
    def active(self) -> np.ndarray:
        """Slots that run anything: bool [slots]. The others are skipped whole."""
        return (self.operations != Operation.SHORTCUT).any(axis=(1, 2))

    @property
    def sits_out(self) -> bool:
        """True when the client runs nothing at all in this round."""
        return not bool(self.active.any())

    @cached_property
    def effective(self) -> np.ndarray:
        """Operations as they run; see :func:`effective`."""
        return effective(self.operations)

    def heads(self, what: np.ndarray, block: int) -> tuple[int, ...]:
        """Heads of ``block`` that are set in ``what`` [blocks, heads], ascending."""
        return tuple(what[block].nonzero()[0].tolist())

    def trained_ranks(self, block: int) -> dict[int, int] | None:
        """Trained heads of ``block``, ascending -> their ranks; None where all have the same."""
        if self.ranks is None:
            return None
        return {head: int(self.ranks[block, head]) for head in self.heads(self.trained, block)}

    def mean_rank(self, rank: int = 0) -> float | None:
        """Mean over trained subnets of their ranks; None where nothing trains, or has none.

        Args:
            rank: Of a schedule that says nothing of ranks; 0 for none.
        """
        if not self.trained.any():
            return None
        if self.ranks is None:
            return float(rank) or None
        return float(self.ranks[self.trained].mean())

    def examples_trained(self, slot_examples: Sequence[int]) -> np.ndarray:
        """Examples on which each subnet ran FULL, n_cs of the design: int64 [blocks, heads]."""
        full = self.operations == Operation.FULL
        return np.tensordot(np.asarray(slot_examples, dtype=np.int64), full, axes=1)

    def block_examples_trained(self, slot_examples: Sequence[int]) -> np.ndarray:
        """Examples on which any subnet of a block ran FULL: int64 [blocks]."""
        full = (self.operations == Operation.FULL).any(axis=2)
        return np.asarray(slot_examples, dtype=np.int64) @ full


def residents(operations: np.ndarray) -> np.ndarray:
    """Whatever any slot of int8 [clients, slots, blocks, heads] runs: bool, without slots."""
    return (operations != Operation.SHORTCUT).any(axis=1)


def trainees(operations: np.ndarray) -> np.ndarray:
    """The same of what trains."""
    return (operations == Operation.FULL).any(axis=1)


def effective(operations: np.ndarray) -> np.ndarray:
    """Operations as they run: FROZEN is FORWARD_ONLY below all that trains in its slot.

    Args:
        operations: int8 [..., slots, blocks, heads].
    """
    full = (operations == Operation.FULL).any(axis=-1)  # [..., slots, blocks]
    below = ~np.logical_or.accumulate(full, axis=-1)
    silent = (operations == Operation.FROZEN) & below[..., None]
    return np.where(silent, np.int8(Operation.FORWARD_ONLY), operations)


def slot_sizes(examples: int, slots: int) -> list[int]:
    """Divide a batch over slots as evenly as possible, the larger first."""
    base, extra = divmod(examples, slots)
    return [base + (slot < extra) for slot in range(slots)]


def passes(sizes: Sequence[int], active: Sequence[bool], parts: int) -> list[list[int]]:
    """Cut a batch into passes that run one after another: per pass, its examples of each slot.

    Examples of inactive slots are not run at all; the others, slot by slot, are divided as evenly
    as possible into at most ``parts`` passes.

    Args:
        sizes: Examples of each slot. active: Which slots run anything.
    """
    run = [size if on else 0 for size, on in zip(sizes, active, strict=True)]
    ends = np.cumsum([0, *run])
    cuts = np.cumsum([0, *slot_sizes(int(ends[-1]), parts)])
    found = []
    for start, stop in pairwise(cuts.tolist()):
        if start < stop:
            found.append(np.diff(ends.clip(start, stop)).tolist())
    return found


def slot_totals(examples: int, batch_size: int, slots: int, epochs: int) -> list[int]:
    """Examples each slot sees in one round of ``epochs`` passes in batches of ``batch_size``."""
    full, rest = divmod(examples, batch_size)
    whole, last = slot_sizes(batch_size, slots), slot_sizes(rest, slots)
    return [epochs * (full * w + r) for w, r in zip(whole, last, strict=True)]


def down_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """What a client is sent: name -> shape. Embedding, final, and of each block what it runs."""
    return _spec(arch, schedule, schedule.resident, trained=False)


def up_spec(arch: Architecture, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """What a client returns: name -> shape. Of the final part and of each block what it trained."""
    return _spec(arch, schedule, schedule.trained, trained=True)


def _spec(
    arch: Architecture, schedule: Schedule, what: np.ndarray, trained: bool
) -> dict[str, tuple[int, ...]]:
    spec: dict[str, tuple[int, ...]] = {}
    for p in arch.parameters:
        if trained and not p.trains:
            continue
        if p.kind in (Kind.FINAL, Kind.EMBEDDING):
            spec[p.name] = p.shape
        elif p.block >= 0 and (heads := schedule.heads(what, p.block)):
            ranks = schedule.trained_ranks(p.block) if trained and p.factor else None
            if ranks is not None:
                spec[p.name] = p.ranked_shape(ranks)
            else:
                spec[p.name] = p.packed_shape(heads) if p.kind is Kind.SLICED else p.shape
    return spec


def carried(
    arch: Architecture, schedule: Schedule, holds: np.ndarray | None = None
) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Parameters that come down for a schedule, with the heads of the sliced ones, ascending.

    Args:
        holds: bool [blocks, heads], subnets whose fixed parameters the client has: these, and what
            blocks and the model need with any of their subnets, are left out.
    """
    for name in down_spec(arch, schedule):
        p = arch.by_name[name]
        held = holds if p.fixed else None
        if p.kind is Kind.SLICED:
            wanted = schedule.resident if held is None else schedule.resident & ~held
            if heads := schedule.heads(wanted, p.block):
                yield p, heads
        elif held is None or not (held if p.block < 0 else held[p.block]).any():
            yield p, ()


def pack_for(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    schedule: Schedule,
    holds: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """The tensors of :func:`carried`, cut out of the global ``weights``."""
    return {
        p.name: p.pack(weights[p.name], heads) if p.kind is Kind.SLICED else weights[p.name]
        for p, heads in carried(arch, schedule, holds)
    }
