"""LoRA, head by head: which factors there are, and the weights that they make.

A product with weights W [out, in] becomes ``W + scaling * B A`` with B [out, rank] and A [rank, in]
(Hu et al., ICLR 2022, arXiv 2106.09685), ``scaling = alpha / rank``, or ``alpha / sqrt(rank)`` with
rsLoRA (Kalajdzievski, arXiv 2312.03732). Of a branch's product in (a vision transformer's ``qkv``
and ``fc1``), which is sliced on its output, a subnet owns its rows of B; of its product out
(``proj`` and ``fc2``), sliced on its input, its columns of A. The other factor is common to the
block. Packed (see :mod:`d2ft_fl.subnets.architecture`) both are

    W_packed + scaling * F G^T      F [rows, rank] of the subnets, G [dim, rank] of the block

As in peft, only factors and the classifier train.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.util.spelling import unknown

FACTORS = ("A", "B")


@dataclass(frozen=True)
class Lora:
    """What LoRA tunes, and how, in the words of peft's ``LoraConfig``.

    Attributes:
        rank: Of every product.
        alpha: What ``scaling`` is computed from.
        targets: Products, of an architecture's ``possible_targets``; empty for all of them.
        rslora: Whether the scaling is alpha / sqrt(rank).
        dropout: Probability, in training, of dropout on what goes into A.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> "Lora":
        """Return what the options of a run ask for.

        Args:
            config: The options of the run.

        Raises:
            ConfigError: When ``lora-targets`` is empty.
        """
        targets = tuple(t.strip() for t in config.lora_targets.split(",") if t.strip())
        if not targets:
            raise ConfigError(
                "lora-targets is empty; name products of a block, such as qkv, proj, fc1, fc2"
            )
        return cls(
            config.lora_rank, config.lora_alpha, targets, config.lora_rslora, config.lora_dropout
        )

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def targets_in(self, arch: Architecture) -> tuple[str, ...]:
        """Return the products that are targeted.

        Raises:
            ConfigError: When the model has no such products, or one is named twice.
        """
        possible = arch.possible_targets
        for target in self.targets:
            if target not in possible:
                raise ConfigError(unknown("lora-targets: ", target, possible))
        self.check_targets()
        return self.targets or possible

    def check_targets(self) -> None:
        """Raise ConfigError when a product is named twice."""
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora-targets = {', '.join(self.targets)!r} names one twice")

    def check(self, arch: Architecture) -> tuple[str, ...]:
        """Return the products that are targeted, once this fits the model.

        Raises:
            ConfigError: See :meth:`targets_in`; or when the smallest product has a lower rank.
        """
        targets = self.targets_in(arch)
        most = most_rank(arch, targets)
        if not 1 <= self.rank <= most:
            raise ConfigError(
                f"lora-rank = {self.rank} must lie between 1 and {most}, the rank of the smallest "
                "product that lora-targets names"
            )
        return targets


def most_rank(arch: Architecture, targets: Iterable[str]) -> int:
    """Return the rank of the smallest of some products."""
    shapes = {p.role.split(".")[0]: p.shape for p in weights(arch)}
    return min(min(shapes[target]) for target in targets)


def weights(arch: Architecture) -> list[Parameter]:
    """Return the weights that LoRA may target, of every block."""
    wanted = {f"{target}.weight" for target in arch.possible_targets}
    return [p for p in arch.of_kind(Kind.SLICED) if p.role in wanted]


def is_common(arch: Architecture, target: str, factor: str) -> bool:
    """Whether a target's factor is to belong to the block, and the other to its subnets.

    Once an architecture has factors, those that belong to blocks are ``Kind.SHARED``.
    """
    return factor == ("B" if any(target == b.outward for b in arch.branches) else "A")


def factor_name(weight: str, factor: str) -> str:
    """Return peft's name of a factor of a weight, but for its prefix."""
    return f"{weight.removesuffix('.weight')}.lora_{factor}.weight"


def with_lora(
    arch: Architecture,
    lora: Lora,
    frozen: Iterable[tuple[str, str]] = (),
    fixed: Iterable[tuple[str, str]] | None = None,
) -> Architecture:
    """Return the architecture with LoRA's factors; they and the classifier alone train.

    Args:
        arch: Without factors.
        lora: What is tuned, and how.
        frozen: (target, factor) of the factors that do not train.
        fixed: (target, factor) of the factors that never change; ``frozen`` unless told otherwise.
    """
    targets = lora.check(arch)
    at_rest = set(frozen)
    unchanging = at_rest if fixed is None else set(fixed)
    parameters = []
    for p in arch.parameters:
        trains = arch.is_classifier(p)
        parameters.append(replace(p, trains=trains, fixed=not trains))
        target, _, part = p.role.partition(".")
        if part != "weight" or target not in targets:
            continue
        out, into = p.shape
        for factor in FACTORS:
            common = is_common(arch, target, factor)
            parameters.append(
                replace(
                    p,
                    name=factor_name(p.name, factor),
                    shape=(lora.rank, into) if factor == "A" else (out, lora.rank),
                    kind=Kind.SHARED if common else Kind.SLICED,
                    role=f"{target}.lora_{factor}",
                    axis=0 if common else p.axis,
                    rows=() if common else p.rows,
                    trains=(target, factor) not in at_rest,
                    fixed=(target, factor) in unchanging,
                    factor=factor,
                )
            )
    return replace(
        arch,
        parameters=tuple(parameters),
        rank=lora.rank,
        scaling=lora.scaling,
        lora_dropout=lora.dropout,
    )


def targets_alone(arch: Architecture, lora: Lora) -> Architecture:
    """Return the architecture without factors in which targeted weights and classifier train."""
    roles = {f"{target}.weight" for target in lora.check(arch)}

    def trains(p: Parameter) -> bool:
        return p.role in roles or arch.is_classifier(p)

    parameters = [replace(p, trains=trains(p), fixed=not trains(p)) for p in arch.parameters]
    return replace(arch, parameters=tuple(parameters))


def without_lora(arch: Architecture) -> Architecture:
    """Return the architecture without factors: everything but the embedding trains."""
    plain = (p for p in arch.parameters if not p.factor)
    parameters = [replace(p, trains=p.kind is not Kind.EMBEDDING, fixed=False) for p in plain]
    return replace(arch, parameters=tuple(parameters), rank=0, scaling=0.0, lora_dropout=0.0)


def targeted(arch: Architecture) -> list[tuple[Parameter, Parameter, Parameter]]:
    """Return (weight, its A, its B) of every product that has factors."""
    return [
        (p, arch.by_name[factor_name(p.name, "A")], arch.by_name[factor_name(p.name, "B")])
        for p in weights(arch)
        if factor_name(p.name, "A") in arch.by_name
    ]


def delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * B A``: [out, in], worked out in double precision."""
    return scaling * (b.double() @ a.double())


@torch.no_grad()
def merged(arch: Architecture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a model without factors: its weights, with what factors add."""
    plain = {name: tensor for name, tensor in state.items() if not arch.by_name[name].factor}
    for weight, a, b in targeted(arch):
        change = delta(state[a.name], state[b.name], arch.scaling)
        old = state[weight.name]
        plain[weight.name] = (old.double() + change).to(old.dtype)
    return plain


def merged_packed(arch: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return packed weights, as ``down_spec`` names them, with what factors add."""
    plain = {name: tensor for name, tensor in tensors.items() if not arch.by_name[name].factor}
    for weight, a, b in targeted(arch):
        if weight.name not in plain:
            continue
        inward = a.kind is Kind.SHARED
        near, far = (b, a) if inward else (a, b)
        common = tensors[far.name] if inward else tensors[far.name].t()  # [rank, dim]
        plain[weight.name] = torch.addmm(
            plain[weight.name], tensors[near.name], common, alpha=arch.scaling
        )
    return plain
