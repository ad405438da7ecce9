"""Folding partial updates in, slice by slice.

For a slice s trained by clients C_s, n_cs the examples on which client c ran s FULL,

    theta_s <- theta_s + sum_{c in C_s} n_cs (theta_cs - theta_s) / sum_{c in C_s} n_cs

and theta_s keeps its bits when C_s is empty. With everyone FULL this is FedAvg (McMahan et al.
2017). Sums are 64-bit fixed point, so that they do not depend on the order of replies.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.errors import ReplyError
from d2ft_fl.subnets import Architecture, Kind, Parameter, Schedule, up_spec

FRACTION_BITS = 36  # a sum resolves 1.5e-11 and holds up to 1.3e8
LIMIT = 2.0 ** (62 - FRACTION_BITS)  # of all examples times the largest change


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round.

    Attributes:
        schedule: What it was assigned.
        slot_examples: Examples it ran in each slot.
        tensors: Trained slices, packed, and whole shared and final parameters (``up_spec``).
    """

    schedule: Schedule
    slot_examples: list[int]
    tensors: dict[str, Tensor]

    def weights(self, p: Parameter) -> dict[int, int]:
        """Head -> examples for a sliced parameter; ``{-1: examples}`` for a whole one."""
        if p.kind is Kind.SLICED:
            examples = self.schedule.examples_trained(self.slot_examples)[p.block]
            return {
                h: int(examples[h]) for h in self.schedule.heads(self.schedule.trained, p.block)
            }
        if p.kind is Kind.SHARED:
            return {-1: int(self.schedule.block_examples_trained(self.slot_examples)[p.block])}
        return {-1: int(np.array(self.slot_examples)[self.schedule.active].sum())}


def validate(arch: Architecture, weights: dict[str, Tensor], update: Update) -> None:
    """Check a reply against its assignment: keys, shapes, types, finite values, size of change.

    Raises:
        ReplyError: With the first thing that is wrong.
    """
    spec = up_spec(arch, update.schedule)
    if missing := sorted(spec.keys() - update.tensors.keys()):
        raise ReplyError(f"{missing[0]!r} is missing")
    if extra := sorted(update.tensors.keys() - spec.keys()):
        raise ReplyError(f"{extra[0]!r} was not assigned")
    for name, shape in spec.items():
        tensor = update.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ReplyError(f"{name!r} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != weights[name].dtype:
            raise ReplyError(f"{name!r} is {tensor.dtype}, not {weights[name].dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ReplyError(f"{name!r} holds values that are not finite")


@dataclass(frozen=True)
class Term:
    """What one update adds to the sum of a parameter.

    Attributes:
        parameter, counts: See :meth:`Update.weights`.
        weighted: Change times examples, packed, in fixed point: int64.
    """

    parameter: Parameter
    counts: dict[int, int]
    weighted: Tensor


@dataclass
class Sums:
    """Running sums of a round. ``add`` commutes; ``apply`` divides once, at the end.

    Attributes:
        arch, weights: The model, and its values before the round.
        examples: Examples that all updates together can count; what may be added follows.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    examples: int
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, dict[int, int]] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Validate one update and add it; nothing is added when anything is wrong.

        Raises:
            ReplyError: See :meth:`terms`.
        """
        self.include(self.terms(update))

    def terms(self, update: Update) -> "list[Term]":
        """Validate one update and weight its changes, for :meth:`include`; adds nothing.

        Raises:
            ReplyError: See :func:`validate`; also when a change is too large to be summed.
        """
        validate(self.arch, self.weights, update)
        terms = []
        for name, tensor in update.tensors.items():
            p = self.arch.by_name[name]
            counts = update.weights(p)
            heads = tuple(h for h in counts if h >= 0)
            old = p.pack(self.weights[name], heads) if heads else self.weights[name]
            change = tensor.double() - old.double()
            if bool((change.abs() * max(1, self.examples) > LIMIT).any()):
                raise ReplyError(f"{name!r} changes by more than can be summed")
            weighted = change * _per_row(p, counts, tensor)
            terms.append(Term(p, counts, torch.round(weighted * 2.0**FRACTION_BITS).long()))
        return terms

    def include(self, terms: "list[Term]") -> None:
        """Add what :meth:`terms` returned."""
        for term in terms:
            p = term.parameter
            heads = tuple(h for h in term.counts if h >= 0)
            total = self._sums.setdefault(p.name, torch.zeros(p.shape, dtype=torch.long))
            if heads:
                p.unpack_(total, p.pack(total, heads) + term.weighted, heads)
            else:
                total += term.weighted
            known = self._counts.setdefault(p.name, {})
            for head, count in term.counts.items():
                known[head] = known.get(head, 0) + count

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Parameters of which somebody trained anything, on one example at least.

        Returns:
            Name -> the heads in ascending order, none for a whole parameter.
        """
        counted = {
            name: [head for head, n in counts.items() if n] for name, counts in self._counts.items()
        }
        return {
            name: tuple(sorted(h for h in heads if h >= 0))
            for name, heads in counted.items()
            if heads
        }

    def apply(self) -> dict[str, Tensor]:
        """The new global weights; what nobody trained is the old tensor's bits."""
        new = dict(self.weights)
        for name, heads in self.trained.items():
            p, old, total = self.arch.by_name[name], self.weights[name], self._sums[name]
            counts = self._counts[name]
            new[name] = value = old.clone()
            mean = p.pack(total, heads) if heads else total
            rows = _per_row(p, {h: counts[h] for h in heads} if heads else counts, mean)
            step = mean.double() / 2.0**FRACTION_BITS / rows
            if heads:
                moved = (p.pack(old, heads).double() + step).to(old.dtype)
                p.unpack_(value, moved, heads)
            else:
                value.copy_((old.double() + step).to(old.dtype))
        return new


def _per_row(p: Parameter, counts: dict[int, int], like: Tensor) -> Tensor | float:
    """Examples as a factor: a number, or one per packed row, shaped to multiply ``like``."""
    if p.kind is not Kind.SLICED:
        return float(counts[-1])
    rows = torch.cat(
        [torch.full((len(p.rows[h]),), float(n), dtype=torch.float64) for h, n in counts.items()]
    )
    return rows.view(-1, *[1] * (like.dim() - 1))
