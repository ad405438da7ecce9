"""The residual branches of a block: what they consist of, and what of them trains.

A branch adds to the residual stream what its products make of it,

    x <- x + scale * (bias + sum_h middle(norm(x) W_in[h]) W_out[h])

and a block is a sequence of branches, usually attention and a feed-forward layer. Every head h
has a slice of each product of each branch. Parameters go by *roles*, names within a block that are
the same in every block: ``qkv.weight`` is the weight of a product ``qkv``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class BranchKind(Enum):
    """What a branch computes between its products in and its product out."""

    ATTENTION = "attention"  # mixes tokens: two products of [tokens, tokens] matrices a head
    FEED_FORWARD = "feed-forward"  # element by element


@dataclass(frozen=True)
class BranchSpec:
    """One branch of every block; blocks are alike.

    Attributes:
        kind: What it computes between the products.
        norm: Module of its norm: parameters have the roles ``norm.weight`` and ``norm.bias``.
        inward: Modules of its products in, such as ``("qkv",)``; the first may have LoRA's factors.
        outward: Module of its product out.
        widths: What each head hands to the product out, in columns: [heads].
        middle: Roles of shared parameters between the products, such as ``q_norm.weight``.
        scale: Role of its layer scale; empty where it has none.
        norm_first: Whether the norm stands before the products, and not behind the sum. The engine
            runs only the former yet.
        gated: Whether the last product in gates what the middle makes.
        head_norms: How many norms of single heads the middle has: 2 for queries and keys.
        dropout: Probability of dropout in the middle.
    """

    kind: BranchKind
    norm: str
    inward: tuple[str, ...]
    outward: str
    widths: tuple[int, ...]
    middle: tuple[str, ...] = ()
    scale: str = ""
    norm_first: bool = True
    gated: bool = False
    head_norms: int = 0
    dropout: float = 0.0

    @property
    def head_width(self) -> int:
        """Width of one head, where all are alike, as those of attention are."""
        return self.widths[0]

    @property
    def saves_result(self) -> bool:
        """Whether the middle saves what it makes: attention does, but for a gate or a copy."""
        return self.kind is BranchKind.ATTENTION and not self.gated and not self.head_norms

    @property
    def norm_roles(self) -> tuple[str, str]:
        """Roles of the parameters of the norm."""
        return f"{self.norm}.weight", f"{self.norm}.bias"

    @property
    def outward_weight(self) -> str:
        """Role of the weight of the product out."""
        return f"{self.outward}.weight"

    @property
    def bias(self) -> str:
        """Role of the bias of the product out, which the heads share."""
        return f"{self.outward}.bias"

    @property
    def targets(self) -> tuple[str, str]:
        """Products that may have LoRA's factors: the first one in, and the one out."""
        return self.inward[0], self.outward

    @property
    def far_roles(self) -> tuple[str, str]:
        """Roles of the LoRA factors that the heads share, of the product in and the one out."""
        return f"{self.inward[0]}.lora_A", f"{self.outward}.lora_B"

    @property
    def shared_roles(self) -> tuple[str, ...]:
        """Every role of the branch that its heads share, whether there is a parameter or not."""
        scale = (self.scale,) if self.scale else ()
        return (*self.norm_roles, self.bias, *scale, *self.middle, *self.far_roles)

    def owns(self, role: str) -> bool:
        """Whether a parameter of this role is the branch's."""
        modules = (self.norm, *self.inward, self.outward)
        return role.split(".")[0] in modules or role in self.middle or role == self.scale


@dataclass(frozen=True)
class Trains:
    """What of a branch trains where one of its subnets is FULL.

    Attributes:
        anything: Any parameter of the branch.
        norm: Its norm; else gradient is wanted at its input for lower branches alone.
        scale: Its layer scale.
        inward: Anything between norm and product out.
        y: Whether a gradient is a product with what goes into the products in.
        z: Whether a gradient is a product with what goes into the product out.
        weights: Whether the weights of the products (in, out) train.
        near: Whether the LoRA factors that heads divide train, of the products (in, out); see
            :mod:`d2ft_fl.lora.config`.
        far: Whether the LoRA factors that heads share train, of the products (in, out).
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
    def of(cls, roles: Iterable[str], branch: BranchSpec) -> "Trains":
        """Make it of the roles of a block that train."""
        trained = {role for role in roles if branch.owns(role)}
        modules = {role.split(".")[0] for role in trained}
        first, out = branch.targets
        into = {f"{module}.{part}" for module in branch.inward for part in ("weight", "lora_A")}
        return cls(
            anything=bool(trained),
            norm=branch.norm in modules,
            scale=branch.scale in trained,
            inward=bool(modules & set(branch.inward) or trained & set(branch.middle)),
            y=bool(trained & into),
            z=bool(trained & {f"{out}.weight", f"{out}.lora_A"}),
            weights=(f"{first}.weight" in trained, f"{out}.weight" in trained),
            near=(f"{first}.lora_B" in trained, f"{out}.lora_A" in trained),
            far=(f"{first}.lora_A" in trained, f"{out}.lora_B" in trained),
        )
