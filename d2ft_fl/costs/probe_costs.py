"""Costs of probes: a client scores subnets and selects examples before it trains.

Probes run the whole model, which comes down for them. They are charged to the client's budgets.
"""

from dataclasses import dataclass, replace

import numpy as np

from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.costs.resources import MEMORY_MARGIN, MOST_WORK, Cost
from d2ft_fl.costs.seconds import RoundSeconds
from d2ft_fl.lora.config import without_lora
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire.sizes import ELEMENT, TENSOR_HEADER


@dataclass(frozen=True)
class Probes:
    """What a client does with the whole model before it trains its part.

    Attributes:
        scored: Examples on which subnets are scored; 0 for none.
        viewed: Examples whose outputs are looked at, to select what to train on; 0 for none.
        kinds: Kinds of scores to measure; see :data:`~d2ft_fl.planning.importance.MEASURED`.
    """

    scored: int = 0
    viewed: int = 0
    kinds: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.scored or self.viewed)

    @property
    def alternatives(self) -> tuple["Probes", ...]:
        """Probes to try in turn where budgets do not afford all: all, selecting alone, none."""
        return tuple(dict.fromkeys((self, Probes(viewed=self.viewed), NO_PROBES)))


NO_PROBES = Probes()


def probes_cost(costs: CostModel, probes: Probes, cached: np.ndarray | None = None) -> Cost:
    """Return the cost of probes over the whole model, which comes down for them.

    Scoring takes one example at a time, everything FULL; selecting takes a batch at a time,
    forward only. One float32 [blocks, heads] goes up for each kind of scores. Memory and FLOPs of
    scoring do not depend on the number of kinds: all are taken from one gradient.

    Args:
        costs: The cost model.
        probes: What the client does before training.
        cached: Subnets whose fixed parameters the client has: bool [blocks, heads].
    """
    cost = costs.known(probes, lambda: _probes_cost(costs, probes))
    if cached is None or not probes:
        return cost
    everything = costs.everything().operations[None]
    return replace(cost, bytes_down=costs.communication.down(everything, cached[None]).item())


def _probes_cost(costs: CostModel, probes: Probes) -> Cost:
    if not probes:
        return Cost()
    # Gradients of the likelihood, so without dropout; of the weights themselves, factors merged.
    # Each example is looked at once, however often it is trained on.
    a, plain = without_lora(costs.arch), costs.plain()
    one = replace(plain, arch=a.without_dropout(), options=replace(plain.options, epochs=1))
    resident = sum(p.numel for p in a.parameters)
    merges = bool(probes.scored) + bool(probes.viewed)
    flops, up = merges * costs.arch.rank * int(costs.round_flops.of_merging.sum()), 0
    seconds, work, peaks = one.round_seconds, 0, []
    if probes.scored:
        everything = one.everything()
        widest = max(p.numel for p in a.of_kind(Kind.SLICED))
        flops += one.flops(everything, 1) * probes.scored
        scoring = ELEMENT * (resident + 2 * widest + probes.scored * a.input_elements)
        peaks.append(scoring + one.peak_bytes(everything, [1]))
        work += probes.scored * _pass_work(seconds, everything, 1, live=True)
        up = len(probes.kinds) * (ELEMENT * a.blocks * a.heads + TENSOR_HEADER)
    if probes.viewed:
        batch = min(probes.viewed, costs.options.batch_size)
        forward = Schedule.filled(Operation.FORWARD_ONLY, 1, a.blocks, a.heads)
        blocks = a.blocks * int(one.round_flops.of_operations[Operation.FORWARD_ONLY].sum())
        flops += (a.embed_flops + 2 * a.dim * a.classes + blocks) * probes.viewed
        viewing = ELEMENT * (resident + batch * a.input_elements + probes.viewed)
        peaks.append(viewing + _peak_of_viewing(one, forward, batch))
        whole, rest = divmod(probes.viewed, batch)
        work += whole * _pass_work(seconds, forward, batch, live=False)
        work += _pass_work(seconds, forward, rest, live=False)  # 0 where there is no rest
    down = costs.bytes_down(costs.everything())
    return Cost(flops, max(peaks) + max(peaks) // MEMORY_MARGIN, up, down, work)


def _peak_of_viewing(costs: CostModel, forward: Schedule, examples: int) -> int:
    """Return the peak bytes of a pass whose outputs are looked at, beyond what is resident.

    No gradient is made of the classifier. Of scores there are two tensors in double precision: an
    entropy is that of their softmax.

    Args:
        costs: Of the whole model.
        forward: Which runs it.
        examples: Of the pass.
    """
    b, ranks = costs.activations, np.zeros((1, *forward.operations.shape[1:]), dtype=np.int64)
    sizes = np.array([[examples]])
    memory = costs.round_memory.micro_batches(forward.operations[None], sizes, ranks)
    scores = memory.classifier + examples * 3 * b.scores
    return replace(memory, classifier=scores, gradient=0).peak().item()


def _pass_work(seconds: RoundSeconds, schedule: Schedule, examples: int, live: bool) -> int:
    """Return the work of one pass over the whole model, as ``Cost.work`` has it."""
    operations = schedule.operations[None]
    features = seconds.passes(
        operations,
        np.array([[examples]]),
        np.zeros((1, *operations.shape[2:]), dtype=np.int64),
        live,
    )
    work = (features @ seconds.constants).item() * seconds.machine.peak
    return round(min(work, MOST_WORK))


def with_probes(cost: Cost, before: Cost) -> Cost:
    """Return a round's cost with probes before it, for which everything has come down already.

    Args:
        cost: Of the round without probes.
        before: Of the probes.
    """
    return Cost(
        cost.flops + before.flops,
        max(cost.memory, before.memory),
        cost.bytes_up + before.bytes_up,
        before.bytes_down,
        cost.work + before.work,
    )


def round_cost(
    costs: CostModel,
    schedule: Schedule,
    examples: int,
    probes: Probes,
    cached: np.ndarray | None = None,
    timed: bool = True,
) -> Cost:
    """Return the cost of a round, with the probes before it, if any.

    Probes need the whole model, of which the schedule then keeps its part, uncompensated.

    Args:
        costs: The cost model.
        schedule: What the client runs.
        examples: On which it trains.
        probes: What it does before training.
        cached: Subnets whose fixed parameters it has: bool [blocks, heads].
        timed: See :meth:`.CostModel.cost`.
    """
    if not probes:
        return costs.cost(schedule, examples, cached, timed)
    cost = costs.uncompensated.cost(schedule, examples, timed=timed)
    return with_probes(cost, probes_cost(costs, probes, cached))
