"""How long training takes: seconds of rounds on a machine whose speed is known.

FLOPs alone do not tell. A product of few rows or columns runs at a fraction of a machine's speed,
and every branch, pass and step costs time of its own. So a round is a sum over its passes
(micro-batches) of their branches and head groups, and each term is linear in what
:class:`~d2ft_fl.costs.machine_speed.MachineSpeed` says of the machine. With R rows (examples times
tokens) that a head group runs on, D the model's width, w the widths of its heads together, those
behind its products in and those before its product out,

    forward     2 R D w        of every group
    through     2 R D w        of what is FULL or FROZEN, where gradient is wanted there
    weights     2 R D w        of what is FULL, w of that alone
    attention   4 R T w ahead, 10 R T w back (8 unfused)

each over the machine's FLOP/s for R rows and a width of sqrt(D w). What is FULL or FROZEN in a slot
is one group, and one product; what is FORWARD_ONLY is another; neighbouring slots whose heads do
the same are run together. Checkpointing runs products in and attention forward once more. Norms,
residual sums and activations are bytes that are read and written. LoRA's factors are products as
wide as sqrt(D r).

A client's clock runs by the seconds on its class's curve, times that curve's peak over the class's
speed (:meth:`d2ft_fl.budgets.budget.Budget.seconds`).
"""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.machine_speed import MachineSpeed
from d2ft_fl.costs.parameter_counts import Parts
from d2ft_fl.costs.resources import MOST_WORK
from d2ft_fl.costs.round_flops import RoundFlops
from d2ft_fl.costs.round_memory import (
    MOMENTS,
    active_slots,
    cut_in_micro_batches,
    sizes_of_slots,
)
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.branches import BranchKind
from d2ft_fl.subnets.schedule import BranchOperations, Operation, trainees
from d2ft_fl.wire.sizes import ELEMENT

# What a round's seconds are linear in, as `MachineSpeed` names what each is multiplied by.
FEATURES = (
    "product", "weight", "attend", "traffic", "branch", "mixed", "silent", "group",
    "passes", "step", "tensor", "stepped", "start", "coded",
)  # fmt: skip
FORWARD, THROUGH, WEIGHTS = range(3)
CHUNK = 128  # clients that are looked at at once: more take memory, and not less time
# Tensors as large as the stream, and as the products in of a branch, that a branch reads or writes
# forward and, where gradient passes, backward: norm, residual sum; activation or heads put apart.
STREAM, INNER = (5, 5), (2, 3)


@dataclass(frozen=True, eq=False)
class RoundSeconds:
    """Seconds of clients' rounds on one machine.

    Attributes:
        flops: FLOPs of the same rounds, which say of what model, how trained, in how many slots.
        parts: Parameter counts of the model.
        coded: Numbers of a trained subnet that travel quantized: int64 [blocks, heads].
        machine: How fast the machine is.
    """

    flops: RoundFlops
    parts: Parts
    coded: np.ndarray
    machine: MachineSpeed

    @property
    def arch(self) -> Architecture:
        """The architecture, with as many tokens as blocks see."""
        return self.flops.arch

    @property
    def options(self) -> TrainingOptions:
        """How clients train."""
        return self.flops.options

    def of(self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the seconds of rounds of local training: float64 [clients].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
        """
        return (self.features(operations, examples, ranks) * self.constants).sum(axis=1)

    def work(self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return how long clients compute, messages included, as ``Cost.work`` has it: int64.

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
        """
        seconds = np.zeros(len(operations))
        for start in range(0, len(operations), CHUNK):
            part = slice(start, start + CHUNK)
            seconds[part] = self.of(operations[part], examples[part], ranks[part])
        works = operations.any(axis=(1, 2, 3)) & (examples > 0)
        # Whole numbers: the last bits of sums depend on how many clients are looked at at once.
        work = (seconds + 2 * self.machine.message * works) * self.machine.peak
        return np.rint(np.minimum(work, MOST_WORK)).astype(np.int64)

    @cached_property
    def constants(self) -> np.ndarray:
        """What the machine takes for each of ``FEATURES``: float64 [features]."""
        return np.array([getattr(self.machine, name) for name in FEATURES])

    def features(
        self, operations: np.ndarray, examples: np.ndarray, ranks: np.ndarray
    ) -> np.ndarray:
        """Return what rounds consist of: float64 [clients, features].

        Args:
            operations: int8 [clients, slots, blocks, heads].
            examples: On which clients train: int64 [clients].
            ranks: Of subnets that train, else 0: int64 [clients, blocks, heads].
        """
        batch = self.options.batch_size
        full, rest = np.divmod(examples, batch)
        kinds = [(np.full_like(examples, batch), full), (rest, np.ones_like(rest))]
        passes = [p for size, times in kinds for p in self._passes(operations, size, times)]
        who = np.concatenate([chosen for chosen, _, _ in passes])
        sizes = np.concatenate([sizes for _, sizes, _ in passes])
        times = np.concatenate([times for _, _, times in passes])
        total = np.zeros((len(operations), len(FEATURES)))
        if not len(who):
            return total
        each = self.passes(operations[who], sizes, ranks[who]) * times[:, None]
        np.add.at(total, who, each)
        steps = full + (rest > 0)
        total[:, FEATURES.index("step")] = steps
        total[:, FEATURES.index("tensor")] = steps * self._tensors(operations)
        total[:, FEATURES.index("stepped")] = steps * self._stepped_bytes(operations, ranks)
        total *= self.options.epochs
        trained = trainees(operations)
        total[:, FEATURES.index("start")] = 1 + trained.any(axis=2).sum(axis=1)
        total[:, FEATURES.index("coded")] = (trained * self.coded).sum(axis=(1, 2))
        works = operations.any(axis=(1, 2, 3)) & (examples > 0)
        return total * works[:, None]

    def _passes(
        self, operations: np.ndarray, batch: np.ndarray, times: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Cut batches into passes, as :func:`~d2ft_fl.subnets.schedule.micro_batches` does.

        Args:
            operations: int8 [clients, slots, blocks, heads].
            batch: Examples of a batch of each client: int64 [clients].
            times: How often it runs one: int64 [clients].

        Returns:
            Clients [passes], examples of each slot [passes, slots] and how often, [passes]: of all
            passes that are not alike.
        """
        running = sizes_of_slots(batch, self.flops.slots) * active_slots(operations)
        total = running.sum(axis=1)
        parts = self.options.micro_batches
        found = []
        if self.flops.slots == 1:  # of two sizes at most
            size, extra = np.divmod(total, parts)
            kinds = [((size + 1)[:, None], extra), (size[:, None], parts - extra)]
        else:
            sizes = cut_in_micro_batches(running, np.full_like(total, parts))
            kinds = [(one, np.ones_like(total)) for one in np.moveaxis(sizes, 1, 0)]
        for sizes, count in kinds:
            chosen = np.flatnonzero((count * times > 0) & sizes.any(axis=1))
            found.append((chosen, sizes[chosen], (count * times)[chosen]))
        return found

    def _tensors(self, operations: np.ndarray) -> np.ndarray:
        """Count the tensors that are stepped: int64 [clients]."""
        blocks = trainees(operations).any(axis=2)
        return blocks @ self.parts.trained.tensors + self.parts.trained.outer_tensors

    def _stepped_bytes(self, operations: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Count the bytes of what is stepped, of its gradients and moments: int64 [clients]."""
        parts = self.parts
        elements = parts.trained.outer + parts.whole.elements(trainees(operations))
        if self.arch.rank:
            elements = elements + parts.ranked.elements(ranks)
        return ELEMENT * (2 + MOMENTS[self.options.optimizer]) * elements

    # -- one pass ----------------------------------------------------------------------------

    @cached_property
    def widths(self) -> np.ndarray:
        """Columns of each head behind products in, and before the product out: [2, 2, heads]."""
        widths = []
        for branch, spec in enumerate(self.arch.branches):
            rows = sum(self.arch.rows_in(branch).values(), np.int64(0))
            widths.append([rows, spec.widths])
        return np.array(widths, dtype=np.int64)  # [branches, in and out, heads]

    @property
    def _again(self) -> np.ndarray:
        """How often products in and out run forward once more: float64 [2]."""
        return np.array([float(self.options.checkpointing), 0.0])

    def passes(
        self, operations: np.ndarray, sizes: np.ndarray, ranks: np.ndarray, live: bool = True
    ) -> np.ndarray:
        """Return what single passes consist of, steps left out: float64 [passes, features].

        Args:
            operations: int8 [passes, slots, blocks, heads].
            sizes: Examples of each slot: int64 [passes, slots].
            ranks: Of subnets that train, else 0: int64 [passes, blocks, heads].
            live: Whether there is a backward pass.
        """
        run = BranchOperations.of(operations, self.arch.trains)
        found = np.zeros((len(operations), len(FEATURES)))
        found[:, FEATURES.index("passes")] = sizes.any(axis=1)
        rows = self.arch.tokens * sizes.sum(axis=1)
        embed = 2 * self.arch.dim * self.arch.classes * (3 if live else 1) + self.arch.embed_flops
        per_flop = self.machine.product_seconds(FORWARD, rows, np.array(self.arch.dim))
        found[:, 0] += sizes.sum(axis=1) * embed * per_flop
        for slot, examples in enumerate(self._runs(run, sizes)):
            self._add_branches(found, run.operations[:, slot], run.through[:, slot], examples, live)
        if self.arch.rank:
            self._add_factors(found, operations, run, sizes, ranks)
        return found

    def _runs(self, run: BranchOperations, sizes: np.ndarray) -> list[np.ndarray]:
        """Join neighbouring slots in which a branch does the same.

        Returns:
            Of each slot, the examples of the run of slots that ends with it: int64 [passes, blocks,
            branches], 0 where none does.
        """
        slots = sizes.shape[1]
        same = (run.operations[:, 1:] == run.operations[:, :-1]).all(axis=-1)
        same &= run.through[:, 1:] == run.through[:, :-1]
        found = []
        held = np.zeros((len(sizes), *run.through.shape[2:]), dtype=np.int64)
        for slot in range(slots):
            held = held + sizes[:, slot, None, None]
            ends = ~same[:, slot] if slot + 1 < slots else True
            found.append(np.where(ends, held, 0))
            held = np.where(ends, 0, held)
        return found

    def _add_branches(
        self,
        found: np.ndarray,
        operations: np.ndarray,
        through: np.ndarray,
        examples: np.ndarray,
        live: bool,
    ) -> None:
        """Add what branches consist of in a run of slots that do the same.

        Args:
            found: What is added to: float64 [passes, features].
            operations: int8 [passes, blocks, branches, heads].
            through: Whether gradient is wanted below: bool [passes, blocks, branches].
            examples: Of the run: int64 [passes, blocks, branches].
            live: Whether there is a backward pass.
        """
        through = through & live
        ran = examples > 0
        full = (operations == Operation.FULL) & ran[..., None]
        alive = (operations >= Operation.FROZEN) & ran[..., None]
        silent = (operations == Operation.FORWARD_ONLY) & ran[..., None]
        if not live:
            silent, full, alive = silent | alive, full & False, alive & False
        rows = self.arch.tokens * examples
        # Columns of FULL, live and silent heads, in and out: [3, passes, blocks, branches, 2]
        heads = np.stack([full, alive, silent]).astype(np.float64)
        columns = (heads[..., None, :] @ self.widths.mT).squeeze(-2)
        of_full, of_alive, of_silent = columns
        inward = np.array([t.inward for t in self.arch.trains])
        deep = through | (full.any(axis=-1) & inward)
        weights = np.array([t.weights for t in self.arch.trains])
        work = np.stack(
            [
                of_alive * (1.0 + self._again),
                of_silent,
                of_alive * np.stack([through, deep], axis=-1),
                of_full * weights,
            ]
        )
        width = np.sqrt(self.arch.dim * columns[[1, 2, 1, 0]])
        kinds = np.array([FORWARD, FORWARD, THROUGH, WEIGHTS])[:, None, None, None, None]
        per_flop = self.machine.product_seconds(kinds, rows[..., None], width)
        seconds = (work * rows[..., None] * per_flop).sum(axis=(2, 3, 4)) * (2.0 * self.arch.dim)
        found[:, 0] += seconds[:3].sum(axis=0)
        found[:, 1] += seconds[3]
        found[:, 2] += self._attention(rows, of_alive, of_silent, deep)
        is_alive, is_silent = alive.any(axis=-1), silent.any(axis=-1)
        any_ran = is_alive | is_silent
        inner = (of_alive + of_silent)[..., 0] * INNER[0] + of_alive[..., 0] * INNER[1]
        stream = self.arch.dim * (STREAM[0] * any_ran + STREAM[1] * is_alive)
        found[:, 3] += ELEMENT * (rows * (inner + stream)).sum(axis=(1, 2))
        mixed = is_alive & (is_silent | (full != alive).any(axis=-1))
        groups = is_alive & is_silent
        for feature, counts in ((4, is_alive), (5, mixed), (6, any_ran & ~is_alive), (7, groups)):
            found[:, feature] += counts.sum(axis=(1, 2))

    def _attention(
        self, rows: np.ndarray, alive: np.ndarray, silent: np.ndarray, deep: np.ndarray
    ) -> np.ndarray:
        """Return seconds of attention by the machine's table: float64 [passes].

        Args:
            rows: Examples times tokens: int64 [passes, blocks, branches].
            alive: Columns of live heads, in and out: int64 [passes, blocks, branches, 2].
            silent: Columns of the others that run.
            deep: Whether gradient goes through the live ones: bool [passes, blocks, branches].
        """
        total = np.zeros(len(rows))
        for branch, spec in enumerate(self.arch.branches):
            if spec.kind is not BranchKind.ATTENTION:
                continue
            here = np.s_[:, :, branch]
            ahead, back = (
                self.machine.attention_seconds(way, self.arch.tokens, spec.head_width)
                for way in range(2)
            )
            one = 2.0 * self.arch.tokens * rows[here]
            live, still = alive[here][..., 1], silent[here][..., 1]
            again = 1 + self.options.checkpointing
            seconds = 2 * ahead * one * (live * again + still)
            seconds += (5 if self.flops.fused else 4) * back * one * live * deep[here]
            total += seconds.sum(axis=1)
        return total

    def _add_factors(
        self,
        found: np.ndarray,
        operations: np.ndarray,
        run: BranchOperations,
        sizes: np.ndarray,
        ranks: np.ndarray,
    ) -> None:
        """Add the products of LoRA's factors, and one more group in each branch that has some."""
        of_ranks = partial(self.flops.by_branch.per_slot, operations, self.arch.trains)
        per_slot = of_ranks(ranks) - of_ranks(np.zeros_like(ranks))
        rows = self.arch.tokens * sizes.sum(axis=1)
        width = np.sqrt(self.arch.dim * ranks.max(axis=(1, 2)))
        per_flop = self.machine.product_seconds(FORWARD, rows, width)
        found[:, 0] += (per_slot * sizes).sum(axis=1) * per_flop
        full = (run.operations == Operation.FULL).any(axis=-1) & (sizes > 0)[..., None, None]
        found[:, 7] += full.any(axis=1).sum(axis=(1, 2))
