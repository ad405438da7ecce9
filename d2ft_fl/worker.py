"""The client's side of a round: answer what it can afford, and train what it is assigned.

One worker serves any number of clients in turn: it builds its model and decodes its data once a
process, and resets in place for each assignment.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl import holdings, timm_vit, wire
from d2ft_fl.budgets import Budget, ClientDescription
from d2ft_fl.compensation import MeanTally, received
from d2ft_fl.config import RunConfig
from d2ft_fl.costs import RANK_BYTES, RESOURCES, CostModel, round_cost
from d2ft_fl.data import FederatedData, open_data
from d2ft_fl.errors import Refusal
from d2ft_fl.holdings import Store
from d2ft_fl.lora import merged_packed
from d2ft_fl.meter import Meter, free_memory, set_threads, warm_up
from d2ft_fl.models import build_model
from d2ft_fl.partial import PartialModel
from d2ft_fl.rounds import Federation, Report
from d2ft_fl.scores import TENSOR
from d2ft_fl.subnets import Architecture, Kind, Operation, Schedule, slot_totals
from d2ft_fl.training import score_pass, train


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
        schedule = _schedule(meta)
        scored, calibrates = int(meta["score_examples"]), bool(meta["calibrate"])
        model, data = self._parts
        stage = self._federation.at(round)
        arch, offsets = stage.arch, received(schedule, tensors)
        everything = Schedule.filled(Operation.FULL, 1, *schedule.operations.shape[1:])
        holds = None
        if "holds" in meta:
            holds = _unpacked(meta["holds"], schedule.resident.shape)
        if meta["keeps_budgets"]:
            costs = stage.cost_models[bool(offsets), calibrates]
            self._refuse_unless_it_fits(client, round, schedule, costs, scored, holds)
        if holds is not None:
            carried = everything if scored else schedule
            names = holdings.read(carried, meta["digests"])
            tensors = self.store.complete(arch, carried, tensors, holds, names)
        order = self._order(client, round, len(data.partitions[client]))
        self.meter.start()
        result: dict[str, Tensor] = {}
        if scored:
            own = self._federation.arch
            model.tune(own)
            model.numerics = self.options.plain().numerics()
            merged = self.meter.count(partial(merged_packed, arch, tensors))
            model.reset(everything, merged, gradients=False)
            del merged
            images, labels = data.client_batch(client, order[0][:scored], self.device)
            measured = score_pass(model, images, labels, self.config.score_kinds(), self.meter)
            for kind, values in measured.items():
                result[TENSOR + kind] = torch.from_numpy(values).float()
            tensors = self._narrow(arch, tensors, schedule)
        model.numerics = self.options.numerics()
        if model.arch is not arch:
            model.tune(arch)
        self.meter.count(partial(model.reset, schedule, tensors, offsets))
        del tensors, offsets
        means = MeanTally(model) if calibrates else None
        batches = (data.client_batch(client, p, self.device) for p in self._positions(order))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            draw = np.random.default_rng(self._seed(client, round))
            torch.manual_seed(int(draw.integers(2**62)))  # of dropout
            smallest = (len(order[0]) - 1) % self.options.batch_size + 1
            loss = train(
                model,
                batches,
                self.options,
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
                len(order[0]), self.options.batch_size, schedule.slots, self.options.epochs
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
        self,
        client: int,
        round: int,
        schedule: Schedule,
        costs: CostModel,
        scored: int,
        holds: np.ndarray | None,
    ) -> None:
        """Hold a plan against this client's own budget, and the memory that is there.

        Raises:
            Refusal: Before anything has started.
        """
        examples = len(self._parts[1].partitions[client])
        cost = round_cost(costs, schedule, examples, scored, holds)
        allowed = self._budget(client, round).capacity(costs.full_cost(examples))
        for resource, planned, most in zip(RESOURCES, cost.vector(), allowed, strict=True):
            if planned > most:
                raise Refusal(f"the plan needs {planned} of {resource}, the budget allows {most}")
        if cost.memory > (free := free_memory(self.device)):
            raise Refusal(f"the plan needs {cost.memory} bytes of memory, {free} are free")

    def _seed(self, client: int, round: int) -> tuple[int, int, int]:
        return self.config.seed, round, client

    def _order(self, client: int, round: int, examples: int) -> list[np.ndarray]:
        """Each epoch's order of a client's examples: a function of seed, round and client."""
        draw = np.random.default_rng([*self._seed(client, round), 1])
        return [draw.permutation(examples) for _ in range(self.options.epochs)]

    def _positions(self, order: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Which of a client's examples each batch holds."""
        for epoch in order:
            for start in range(0, len(epoch), self.options.batch_size):
                yield epoch[start : start + self.options.batch_size]

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
