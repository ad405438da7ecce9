"""Aggregation of clients' LoRA factors.

Head h of a product has the effective rows ``W_h + scaling * F_h G^T`` (see
:mod:`d2ft_fl.lora.config`), and the mean that :mod:`d2ft_fl.aggregation.sums` defines, over the
clients C_h that trained it, is

    change_h = sum_{c in C_h} n_ch scaling (F'_ch G'_c^T - F_h G^T) / sum_{c in C_h} n_ch

with the old value in place of a factor that does not train, and zero where C_h is empty. A product
of means is not the mean of products, and clients that share a block may train different heads of
it. So what a round makes of the weights is compared with the exact change above. Modes of
aggregation:

- ``factors``: means of F and of G (FedIT, Zhang et al., arXiv 2305.05644).
- ``freeze-a``: A does not train (FFA-LoRA, Sun et al., arXiv 2403.12313); ``alternate``: A and B
  train in turn (RoLoRA, Chen et al., arXiv 2409.02346). Exact for qkv and fc1 while A rests, for
  proj and fc2 while B does; else where every slot of a client trains whole blocks. Where one trains
  parts, G moves the heads that nobody trained too, by ``scaling * F_h (G' - G)^T``.
- ``freeze-common``: G does not train. F belongs to heads, so that this is exact whoever trains
  what.
- ``product``: the best factors of the exact product, by singular values (FlexLoRA, Bai et al.,
  arXiv 2402.11505; FedSVD, Lee et al., arXiv 2505.12805, does so while A rests). Off by the
  singular values that the rank leaves out.
- ``stack``: the exact change goes into W, and factors return to where they were (FLoRA, Wang et
  al., arXiv 2409.05976: the sum of products that stacked factors are). Exact, up to W's rounding.

The architecture says which factors train; the first four modes aggregate alike.

Where a client trains head h at a rank r of its own, the columns of F_h and G from r on count as
they were, whatever became of G's with heads of larger ranks: its rows are

    W_h + scaling * (F'_h[:, :r] G'[:, :r]^T + F_h[:, r:] G[:, r:]^T)

Means of factors would mix columns that some clients trained with others', so that clients of
different ranks are aggregated by ``product`` or ``stack``, which know the exact change.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.sums import Sums
from d2ft_fl.aggregation.update import Update, validate
from d2ft_fl.config.choices import LORA_AGGREGATIONS, MIXED_RANK_AGGREGATIONS
from d2ft_fl.errors import ConfigError
from d2ft_fl.lora.config import FACTORS, delta, is_common, targeted, without_lora
from d2ft_fl.lora.init import factorise, silent_factor
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule


def frozen(
    mode: str, arch: Architecture, targets: Iterable[str], round_number: int
) -> list[tuple[str, str]]:
    """Return (target, factor) of the factors that a mode does not train in a round.

    The pairs are an argument of ``with_lora``. In mode ``alternate``, B trains first: where B is
    zero, A has no gradient.

    Args:
        mode: One of :data:`.LORA_AGGREGATIONS`.
        arch: The model's architecture; it may have factors already.
        targets: Products that have factors.
        round_number: Rounds of LoRA count from 1.
    """
    pairs = [(target, factor) for target in targets for factor in FACTORS]
    if mode == "freeze-common":
        return [pair for pair in pairs if is_common(arch, *pair)]
    resting = {"freeze-a": "A", "alternate": "A" if round_number % 2 else "B"}.get(mode)
    return [pair for pair in pairs if pair[1] == resting]


def unchanging(mode: str, arch: Architecture, targets: Iterable[str]) -> list[tuple[str, str]]:
    """Return (target, factor) of the factors that a mode leaves as they began.

    Args:
        mode: One of :data:`.LORA_AGGREGATIONS`.
        arch: The model's architecture; it may have factors already.
        targets: Products that have factors.
    """
    targets = list(targets)
    if mode == "stack":
        return [(target, factor) for target in targets for factor in FACTORS]
    one, next_one = (frozen(mode, arch, targets, number) for number in (1, 2))
    return [pair for pair in one if pair in next_one]


@dataclass
class LoraSums:
    """Running sums of a round under LoRA: an :class:`~d2ft_fl.aggregation.aggregator.Aggregator`.

    Attributes:
        arch: The architecture of the model with its factors.
        weights: All values before the round, by name.
        examples: Examples that all updates together can count.
        mode: One of :data:`.LORA_AGGREGATIONS`.
        measure: Whether to compute the error where the mode does not need the exact change. It
            multiplies every client's factors out, which takes seconds with a large model.
        error: After :meth:`apply`, Frobenius norm of achieved minus exact change of the effective
            weights, over that of the exact change, all targeted weights together; None when nobody
            trained any or it is not measured, infinite when the exact change alone is zero.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    examples: int
    mode: str
    measure: bool = True

    def __post_init__(self) -> None:
        self.error: float | None = None
        if self.mode not in LORA_AGGREGATIONS:
            raise ConfigError(
                f"lora-aggregation = {self.mode!r} is unknown; use one of "
                f"{', '.join(LORA_AGGREGATIONS)}"
            )
        self._sums = Sums(self.arch, self.weights, self.examples)
        self._exact: Sums | None = None
        if not (self.measure or self.mode in MIXED_RANK_AGGREGATIONS):
            return
        whole = {
            weight.name: self.weights[weight.name].double()
            + delta(self.weights[a.name], self.weights[b.name], self.arch.scaling)
            for weight, a, b in targeted(self.arch)
        }
        self._exact = Sums(effective_architecture(self.arch), whole, self.examples)

    def add(self, update: Update) -> None:
        """Validate one update and add it; nothing is added when anything is wrong.

        Args:
            update: What a client sent.

        Raises:
            ReplyError: See :meth:`Sums.terms`, of what was sent and of the weights that it makes.
            ConfigError: When subnets have different ranks and the mode cannot aggregate them.
        """
        if update.schedule.ranks is not None:
            if self.mode not in MIXED_RANK_AGGREGATIONS:
                raise ConfigError(
                    f"lora-aggregation = {self.mode!r} cannot aggregate different ranks; use one "
                    f"of "
                    f"{', '.join(MIXED_RANK_AGGREGATIONS)}"
                )
            validate(self.arch, self.weights, update)
        whole = widened(self.arch, self.weights, update)
        terms = self._sums.terms(whole)
        if self._exact is not None:
            rows = effective_rows(self.arch, self.weights, update)
            exact = Update(update.schedule, update.slot_examples, rows)
            self._exact.include(exact, self._exact.terms(exact))
        self._sums.include(whole, terms)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """See :attr:`Sums.trained`."""
        return self._sums.trained

    @property
    def subnets_trained(self) -> np.ndarray:
        """Subnets that some update trained: bool [blocks, heads]."""
        return self._sums.subnets_trained

    @property
    def figures(self) -> Mapping[str, float | None]:
        """``aggregation_error``: see :attr:`error`."""
        return {"aggregation_error": self.error}

    def apply(self) -> dict[str, Tensor]:
        """Return the new state; sets :attr:`error`."""
        new = self._sums.apply()
        if self._exact is None:
            return new
        exact, trained = self._exact.apply(), self._exact.trained
        off = size = 0.0
        moved = [product for product in targeted(self.arch) if product[0].name in trained]
        for weight, a, b in moved:
            old, wanted = self._exact.weights[weight.name], exact[weight.name]
            if self.mode == "product":
                new.update(self._product(weight, a, b, old, wanted))
            elif self.mode == "stack":
                new.update(self._stack(weight, a, b, wanted - old))
            got = new[weight.name].double() + delta(new[a.name], new[b.name], self.arch.scaling)
            off += float((got - wanted).square().sum())
            size += float((wanted - old).square().sum())
        self.error = _relative(math.sqrt(off), math.sqrt(size)) if trained else None
        return new

    def _product(
        self, weight: Parameter, a: Parameter, b: Parameter, old: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Return the factors whose product comes nearest to the wanted effective weights.

        Args:
            weight: The targeted weight.
            a: Its factor A.
            b: Its factor B.
            old: Effective weights before the round: float64.
            wanted: Effective weights after the exact change: float64.
        """
        base = self.weights[weight.name]
        if wanted.equal(old):
            return {p.name: self.weights[p.name] for p in (a, b)}
        pair = factorise(
            wanted - base.double(),
            self.arch.rank,
            self.arch.scaling,
            self.weights[a.name].dtype,
            silent_factor(a, b),
        )
        return {a.name: pair.a, b.name: pair.b}

    def _stack(
        self, weight: Parameter, a: Parameter, b: Parameter, change: Tensor
    ) -> dict[str, Tensor]:
        """Return the weight with the change added, and factors as before the round."""
        base = self.weights[weight.name]
        moved = (base.double() + change).to(base.dtype)
        return {
            weight.name: torch.where(change == 0, base, moved),  # -0.0 + 0.0 has other bits
            a.name: self.weights[a.name],
            b.name: self.weights[b.name],
        }


def effective_architecture(arch: Architecture) -> Architecture:
    """Return an architecture of the targeted weights alone, which train and have no factors."""
    plain = without_lora(arch)
    weights = tuple(plain.by_name[weight.name] for weight, _, _ in targeted(arch))
    return replace(plain, parameters=weights)


def effective_rows(
    arch: Architecture, weights: Mapping[str, Tensor], update: Update
) -> dict[str, Tensor]:
    """Return what an update makes of the targeted weights of the heads that it trained.

    Args:
        arch: The architecture of the model with its factors.
        weights: All values before the round, by name.
        update: What a client sent.

    Returns:
        Name of the weight -> float64 rows ``W + scaling * F' G'^T``, packed as ``up_spec`` of
        :func:`effective_architecture` wants them.
    """
    rows = {}
    for weight, a, b in targeted(arch):
        heads = update.schedule.heads(update.schedule.trained, weight.block)
        if not heads:
            continue
        common, of_heads = (a, b) if a.kind is Kind.SHARED else (b, a)
        base = weight.pack(weights[weight.name], heads).double()
        f, g = (_trained_factor(p, weights, update, heads) for p in (of_heads, common))
        g = g if common is a else g.T  # G^T: [rank, dim]
        ranks = update.schedule.trained_ranks(weight.block)
        if ranks is None:
            rows[weight.name] = base + arch.scaling * (f @ g)
            continue
        old = weights[common.name].double()
        old = old if common is a else old.T
        change, start = torch.empty_like(base), 0
        for head, rank in ranks.items():
            part = slice(start, start + len(weight.rows[head]))
            change[part] = f[part, :rank] @ g[:rank] + f[part, rank:] @ old[rank:]
            start = part.stop
        rows[weight.name] = base + arch.scaling * change
    return rows


def _trained_factor(
    p: Parameter, weights: Mapping[str, Tensor], update: Update, heads: Iterable[int]
) -> Tensor:
    """Return all columns of a factor after an update: of some heads only, where it is sliced."""
    old = p.pack(weights[p.name], heads) if p.kind is Kind.SLICED else weights[p.name]
    new = update.tensors.get(p.name)
    if new is None:
        return old.double()
    ranks = update.schedule.trained_ranks(p.block)
    return (new if ranks is None else _wide(p, old, new, ranks)).double()


def _wide(p: Parameter, old: Tensor, new: Tensor, ranks: Mapping[int, int]) -> Tensor:
    """Return a factor with all its columns: those that trained are new, the others old.

    Args:
        p: The factor.
        old: Its value before the round; of the trained heads only, where it divides over heads.
        new: Its trained columns, as they travel up.
        ranks: Trained heads, ascending -> ranks.
    """
    whole = old.clone()
    if p.kind is not Kind.SLICED:
        p.cut(whole, max(ranks.values())).copy_(new)
        return whole
    row = taken = 0
    for head, rank in ranks.items():
        count = len(p.rows[head])
        whole[row : row + count, :rank] = new[taken : taken + count * rank].view(count, rank)
        row, taken = row + count, taken + count * rank
    return whole


def widened(arch: Architecture, weights: Mapping[str, Tensor], update: Update) -> Update:
    """Return an update with whole factors and a schedule without ranks.

    Args:
        arch: The architecture of the model with its factors.
        weights: All values before the round, by name.
        update: What a client sent; returned itself where its schedule has no ranks.
    """
    schedule = update.schedule
    if schedule.ranks is None:
        return update
    tensors = dict(update.tensors)
    for name, new in update.tensors.items():
        p = arch.by_name[name]
        if p.factor:
            ranks = schedule.trained_ranks(p.block)
            assert ranks is not None
            old = weights[name]
            old = p.pack(old, ranks) if p.kind is Kind.SLICED else old
            tensors[name] = _wide(p, old, new, ranks)
    return update.holding(tensors, schedule=Schedule(schedule.operations))


def _relative(off: float, size: float) -> float:
    """Return the error ``off`` over ``size``; of nothing over nothing it is 0."""
    if size == 0:
        return 0.0 if off == 0 else math.inf
    return off / size
