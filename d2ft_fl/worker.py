"""The client's side of a round: answer what it can afford, and train what it is assigned.

One worker serves any number of clients in turn: it builds its model and decodes its data once a
process, and resets in place for each assignment.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl import holdings, timm_vit, wire
from d2ft_fl.budgets import Budget, ClientDescription
from d2ft_fl.compensation import MeanTally, received
from d2ft_fl.config import RunConfig
from d2ft_fl.costs import RANK_BYTES, RESOURCES, Cost, CostModel
from d2ft_fl.data import FederatedData, open_data
from d2ft_fl.errors import Refusal
from d2ft_fl.federation import Federation, Report
from d2ft_fl.holdings import Store
from d2ft_fl.lora import merged_packed
from d2ft_fl.meter import Meter, free_memory, set_threads, warm_up
from d2ft_fl.models import build_model
from d2ft_fl.partial import PartialModel
from d2ft_fl.passes import Passes, round_cost
from d2ft_fl.scores import TENSOR
from d2ft_fl.subnets import Architecture, Kind, Operation, Schedule, slot_totals
from d2ft_fl.training import Batches, train
from d2ft_fl.whole import WholeModel


@lru_cache(maxsize=1)
def worker(config: RunConfig) -> "Worker":
    """This process's worker for a run."""
    return Worker(config)


class Worker:
    """Does clients' work under one configuration."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.options = config.local_options()
        self.device = config.torch_device()
        self.rate = config.load_tuning().learning_rate
        self.meter = Meter(verify=config.verify_costs, device=self.device)
        self.budgets = config.budget_source()
        self.store = Store.default()
        self.store.prune()

    @cached_property
    def _template(self) -> timm_vit.VisionTransformer:
        """A model whose weights come with every assignment."""
        return build_model(replace(self.config.model_spec(), pretrained="none"))

    @cached_property
    def _parts(self) -> tuple[PartialModel, FederatedData]:
        model, arch = self._template, self._federation.arch
        channels, side = timm_vit.input_shape(model)
        data = open_data(self.config.data_spec(side, channels))
        warm_up(self.device)
        return PartialModel(model, arch, self.options.numerics(), self.device), data

    @cached_property
    def _federation(self) -> Federation:
        own = timm_vit.describe(self._template)
        return Federation(self.config, own)

    def report(self, client: int, round: int) -> Report:
        """What ``client`` says of itself before ``round``."""
        return Report(client, len(self._parts[1].partitions[client]), self._budget(client, round))

    def _budget(self, client: int, round: int) -> Budget:
        partitions = self._parts[1].partitions
        who = ClientDescription(client, len(partitions[client]), len(partitions))
        return self.budgets(who, round)

    def work(self, blob: bytes) -> bytes:
        """Carry one assignment out. What goes wrong becomes the reply, named."""
        try:
            return self._work(blob)
        except Exception as error:  # the one boundary: a fault is an answer, not a lost worker
            reason = (str(error).strip() or "no message").splitlines()[0]
            return wire.encode({}, {"error": f"{type(error).__name__}: {reason}"})

    def _work(self, blob: bytes) -> bytes:
        set_threads(self.config.threads_per_client)
        started = time.perf_counter()
        tensors, meta = wire.decode(blob)
        client, round = int(meta["client"]), int(meta["round"])
        schedule, passes = _schedule(meta), Passes(*meta["passes"])
        calibrates, examples = bool(meta["calibrate"]), int(meta["examples"])
        options = self.options
        if meta["accumulate"] is not None:
            options = replace(options, accumulate=int(meta["accumulate"]))
        model, data = self._parts
        stage = self._federation.at(round)
        arch, offsets = stage.arch, received(schedule, tensors)
        everything = Schedule.filled(Operation.FULL, 1, *schedule.operations.shape[1:])
        holds = None
        if "holds" in meta:
            holds = _unpacked(meta["holds"], schedule.resident.shape)
        if meta["keeps"]:
            costs = stage.costs_when(bool(offsets), calibrates, meta["accumulate"])
            cost = round_cost(costs, schedule, examples, passes, holds)
            budget = self._budget(client, round)
            if "budget" in meta:
                budget = Budget.from_mapping(meta["budget"])
            self._refuse_unless_it_fits(client, budget, costs, cost, meta["keeps"])
        if holds is not None:
            carried = everything if passes else schedule
            names = holdings.read(carried, meta["digests"])
            tensors = self.store.complete(arch, carried, tensors, holds, names)
        local = len(data.partitions[client])
        chosen = self._order(client, round, local)[0][:examples]
        self.meter.start()
        result: dict[str, Tensor] = {}
        if passes:
            merged = self.meter.count(partial(merged_packed, arch, tensors))
            whole = WholeModel(model, self._federation.arch, merged, self.options, self.meter)
            if passes.viewed:
                batches = self._batches(client, np.arange(local))
                unsure = whole.entropy(batches, self.config.selection_temperature)
                chosen = np.argsort(-unsure, kind="stable")[:examples]
            if passes.scored:
                batch = data.client_batch(client, chosen[: passes.scored], self.device)
                measured = whole.scores(*batch, self.config.measured_scores())
                for kind, values in measured.items():
                    result[TENSOR + kind] = torch.from_numpy(values).float()
            del merged, whole
            tensors = self._narrow(arch, tensors, schedule)
        model.numerics = options.numerics()
        if model.arch is not arch:
            model.tune(arch)
        self.meter.count(partial(model.reset, schedule, tensors, offsets))
        del tensors, offsets
        means = MeanTally(model) if calibrates else None
        epochs = self._epochs(client, round, chosen)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            draw = np.random.default_rng(self._seed(client, round))
            torch.manual_seed(int(draw.integers(2**62)))  # of dropout
            smallest = (examples - 1) % options.batch_size + 1
            loss = train(
                model,
                chain.from_iterable(self._batches(client, epoch) for epoch in epochs),
                options,
                self.rate,
                self.meter,
                means.held() if means else (),
                every_slot=smallest >= schedule.slots,
            )
        result.update({name: tensor.cpu() for name, tensor in model.update().items()})
        if means is not None:
            result.update(means.finish())
        reply = {
            "round": round,
            "client": client,
            "slot_examples": slot_totals(
                examples, options.batch_size, schedule.slots, options.epochs
            ),
            "loss": loss,
            "used": {
                "flops": self.meter.flops,
                "memory": self.meter.peak_bytes,
                "bytes_down": len(blob),
                # Of fixed width, so that the same run is the same number of bytes.
                "seconds": f"{time.perf_counter() - started:012.3f}",
            },
        }
        return wire.encode(result, reply)

    def _refuse_unless_it_fits(
        self, client: int, budget: Budget, costs: CostModel, cost: Cost, keeps: list[str]
    ) -> None:
        """Hold a plan against this client's budget, and the memory that is there.

        Args:
            keeps: The budgets that the plan is to keep.

        Raises:
            Refusal: Before anything has started.
        """
        examples = len(self._parts[1].partitions[client])
        allowed = budget.capacity(costs.full_cost(examples))
        for resource, planned, most in zip(RESOURCES, cost.vector(), allowed, strict=True):
            if planned > most and resource in keeps:
                raise Refusal(f"the plan needs {planned} of {resource}, the budget allows {most}")
        if cost.memory > (free := free_memory(self.device)):
            raise Refusal(f"the plan needs {cost.memory} bytes of memory, {free} are free")

    def _seed(self, client: int, round: int) -> tuple[int, int, int]:
        return self.config.seed, round, client

    def _order(self, client: int, round: int, examples: int) -> list[np.ndarray]:
        """Each epoch's order of so many examples: a function of seed, round and client."""
        draw = np.random.default_rng([*self._seed(client, round), 1])
        return [draw.permutation(examples) for _ in range(self.options.epochs)]

    def _epochs(self, client: int, round: int, chosen: np.ndarray) -> list[np.ndarray]:
        """Each epoch's order of the chosen examples, which are numbers among the client's."""
        everything = self._order(client, round, len(self._parts[1].partitions[client]))
        return [epoch[np.isin(epoch, chosen)] for epoch in everything]

    def _batches(self, client: int, examples: np.ndarray) -> Batches:
        """Some of a client's examples, in batches."""
        for start in range(0, len(examples), self.options.batch_size):
            part = examples[start : start + self.options.batch_size]
            yield self._parts[1].client_batch(client, part, self.device)

    @staticmethod
    def _narrow(
        arch: Architecture, tensors: dict[str, Tensor], schedule: Schedule
    ) -> dict[str, Tensor]:
        """What the schedule needs, out of packed tensors that hold every head."""
        out = {}
        for name, tensor in tensors.items():
            p = arch.by_name[name]
            if p.kind is not Kind.SLICED:
                out[name] = tensor
                continue
            heads = schedule.heads(schedule.resident, p.block)
            bounds = np.cumsum([0, *(len(rows) for rows in p.rows)])
            rows = [r for h in heads for r in range(bounds[h], bounds[h + 1])]
            out[name] = tensor[torch.tensor(rows, dtype=torch.long)]
        return out


def _schedule(meta: Mapping[str, Any]) -> Schedule:
    """The schedule of a message."""
    shape = meta["shape"]
    operations = np.frombuffer(bytes.fromhex(meta["operations"]), dtype=np.int8).reshape(shape)
    if "ranks" not in meta:
        return Schedule(operations)
    ranks = np.frombuffer(bytes.fromhex(meta["ranks"]), dtype=f"<u{RANK_BYTES}")
    return Schedule(operations, ranks.astype(np.int64).reshape(shape[1:]))


def _unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Truth values of a message: bool of a shape."""
    data = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(data, count=int(np.prod(shape))).reshape(shape).astype(bool)
