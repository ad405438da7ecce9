"""What rounds consist of, added up pass by pass, branch by branch and head by head."""

import math
from collections import Counter
from itertools import groupby

import numpy as np

from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.subnets.branches import BranchKind
from d2ft_fl.subnets.schedule import BranchOperations, Schedule, micro_batches, slot_sizes
from tests.costs.by_parameters import added, ranked, tensors

FORWARD, THROUGH, WEIGHTS = 0, 1, 2  # of products, in a machine's tables


def round_features(costs: CostModel, schedule: Schedule, examples: int) -> Counter:
    """What a round consists of: feature -> how much of it."""
    found, options, arch = Counter(), costs.options, costs.arch
    if schedule.sits_out or not examples:
        return found
    for start in range(0, examples, options.batch_size):
        batch = min(options.batch_size, examples - start)
        sizes = slot_sizes(batch, schedule.slots)
        for part in micro_batches(sizes, schedule.active.tolist(), options.micro_batches):
            found += pass_features(costs, schedule, part)
        found["step"] += 1
        found["tensor"] += tensors(arch, lambda p: p.trains, schedule.trained.any(axis=1))
        elements = added(arch, lambda p: p.trains and not p.factor, schedule.trained.astype(int), 1)
        share = ranked(arch, schedule)
        elements += added(arch, lambda p: p.trains and bool(p.factor), share, 0)
        # The weight, its gradient, and what the optimiser keeps.
        found["stepped"] += 4 * elements * {"adamw": 4, "sgd": 3}[options.optimizer]
    found = Counter({name: much * options.epochs for name, much in found.items()})
    found["start"] = 1 + int(schedule.trained.any(axis=1).sum())
    if costs.bits_up < 32:
        matrices = [
            p
            for p in arch.parameters
            if p.rows and len(p.shape) == 2 and not p.factor and not p.fixed
        ]
        found["coded"] = added(arch, matrices.__contains__, schedule.trained.astype(int), 0)
    return found


def pass_features(
    costs: CostModel, schedule: Schedule, sizes: list[int], live: bool = True
) -> Counter:
    """What one pass consists of, forward alone or forward and backward."""
    found, arch, machine = Counter(), costs.seen, costs.machine
    run = BranchOperations.of(schedule.operations, arch.trains)
    rows = arch.tokens * sum(sizes)
    outside = arch.embed_flops + (6 if live else 2) * arch.dim * arch.classes
    found["passes"] += 1
    found["product"] += sum(sizes) * outside * _seconds(machine, FORWARD, rows, arch.dim)
    for block in range(arch.blocks):
        for branch in range(2):
            does = [
                (
                    run.operations[slot, block, branch].tolist(),
                    bool(run.through[slot, block, branch]),
                )
                for slot in range(schedule.slots)
            ]
            for (heads, through), slots in groupby(range(schedule.slots), does.__getitem__):
                if examples := sum(sizes[slot] for slot in slots):
                    found += _branch(costs, branch, heads, through and live, examples, live)
    if arch.rank:
        ranks = costs.ranks(
            schedule.operations[None], None if schedule.ranks is None else schedule.ranks[None]
        )
        per_slot = costs.round_flops.by_branch.per_slot
        args = schedule.operations[None], arch.trains
        of_factors = (per_slot(*args, ranks) - per_slot(*args, 0 * ranks))[0]
        one = _seconds(machine, FORWARD, rows, math.sqrt(arch.dim * max(1, ranks.max())))
        found["product"] += float(of_factors @ sizes) * one
        for block in range(arch.blocks):
            for branch in range(2):
                full = [(run.operations[s, block, branch] == 3).any() for s in range(len(sizes))]
                found["group"] += any(on and size for on, size in zip(full, sizes, strict=True))
    return found


def _branch(
    costs: CostModel, branch: int, heads: list[int], through: bool, examples: int, live: bool
) -> Counter:
    """What one branch consists of, in slots in which it does the same."""
    found, arch, machine = Counter(), costs.seen, costs.machine
    spec, trains = arch.branches[branch], arch.trains[branch]
    again, rows = int(costs.options.checkpointing), arch.tokens * examples
    full = [h for h, does in enumerate(heads) if does == 3 and live]
    alive = [h for h, does in enumerate(heads) if does >= 2 and live]
    silent = [h for h, does in enumerate(heads) if does >= 1 and h not in alive]
    deep = through or (bool(full) and trains.inward)
    inward = sum(arch.rows_in(branch).values()).tolist()
    for widths, wanted, weights, times in (
        (inward, through, trains.weights[0], 1 + again),
        (spec.widths, deep, trains.weights[1], 1),
    ):
        of = [sum(widths[h] for h in group) for group in (alive, silent, full)]
        for feature, kind, width, how_often in (
            ("product", FORWARD, of[0], times),
            ("product", FORWARD, of[1], 1),
            ("product", THROUGH, of[0], int(wanted)),
            ("weight", WEIGHTS, of[2], int(weights)),
        ):
            one = _seconds(machine, kind, rows, math.sqrt(arch.dim * max(1, width)))
            found[feature] += 2 * rows * arch.dim * width * how_often * one
    if spec.kind is BranchKind.ATTENTION:
        ahead, back = (
            machine.attention_seconds(way, arch.tokens, spec.head_width) for way in (0, 1)
        )
        one = 2 * arch.tokens * rows * spec.head_width  # FLOPs of one product of a head
        found["attend"] += 2 * ahead * one * (len(alive) * (1 + again) + len(silent))
        found["attend"] += (5 if costs.fused else 4) * back * one * len(alive) * deep
    into = sum(inward[h] for h in alive), sum(inward[h] for h in silent)
    moved = 2 * sum(into) + 3 * into[0] + 5 * arch.dim * bool(alive or silent)
    found["traffic"] += 4 * rows * (moved + 5 * arch.dim * bool(alive))
    found["branch"] += bool(alive)
    found["mixed"] += bool(alive and (silent or len(full) < len(alive)))
    found["silent"] += bool(silent and not alive)
    found["group"] += bool(silent and alive)
    return found


def _seconds(machine, kind: int, rows: int, width: float) -> float:
    return float(machine.product_seconds(kind, np.array(rows), np.array(width)))
