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

from d2ft_fl.budgets.budget import Budget, ClientDescription
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import LocalOptions
from d2ft_fl.costs.probe_costs import round_cost
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.data.federated_data import FederatedData, open_data
from d2ft_fl.engine.mean_tally import MeanTally, received
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.probes import ProbeRunner
from d2ft_fl.engine.trainer import Batches, train
from d2ft_fl.errors import Refusal
from d2ft_fl.models import timm_vit
from d2ft_fl.models.build import build_model
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation, Report
from d2ft_fl.rounds.messages import Task
from d2ft_fl.subnets.architecture import Architecture, Kind
from d2ft_fl.subnets.packing import GlobalModel, pack_for
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.util.torch_device import free_memory, set_threads, warm_up
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire import parameter_cache
from d2ft_fl.wire.parameter_cache import ParameterCache
from d2ft_fl.wire.quantization import PLAIN, dequantize, is_quantized, quantize, quantize_changes


@lru_cache(maxsize=1)
def client_trainer(config: RunConfig) -> "ClientTrainer":
    """This process's worker for a run."""
    return ClientTrainer(config)


class ClientTrainer:
    """Does clients' work under one configuration."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.components = Components(config)
        self.options = self.components.training
        self.device = self.components.device
        self.rate = self.components.tuning.learning_rate
        self.meter = Meter(verify=config.verify_costs, device=self.device)
        self.budgets = self.components.budget_source
        self.store = ParameterCache.default()
        self.store.prune()
        self._whole: tuple[Architecture, Mapping[str, Tensor], GlobalModel] | None = None

    @cached_property
    def _template(self) -> timm_vit.VisionTransformer:
        """A model whose weights come with every assignment."""
        return build_model(replace(self.components.model_spec, pretrained="none"))

    @cached_property
    def _parts(self) -> tuple[PartialModel, FederatedData]:
        model, arch = self._template, self._federation.arch
        channels, side = timm_vit.input_shape(model)
        data = open_data(self.components.data_spec(side, channels))
        warm_up(self.device)
        return PartialModel(model, arch, self.options.numerics(), self.device), data

    @cached_property
    def _federation(self) -> Federation:
        own = timm_vit.describe(self._template)
        return Federation(self.components, own)

    def report(self, client: int, round_number: int) -> Report:
        """What ``client`` says of itself before ``round``."""
        return Report(
            client, len(self._parts[1].partitions[client]), self._budget(client, round_number)
        )

    def _budget(self, client: int, round_number: int) -> Budget:
        partitions = self._parts[1].partitions
        who = ClientDescription(client, len(partitions[client]), len(partitions))
        return self.budgets(who, round_number)

    def work(self, blob: bytes, weights: Mapping[str, Tensor] | None = None) -> bytes:
        """Carry one assignment out; returns the reply. See :meth:`answer`."""
        return wire.encode(*self.answer(blob, weights))

    def answer(
        self, blob: bytes, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Carry one assignment out. What goes wrong becomes the reply, named.

        Args:
            weights: The global model, where it is at hand and did not come with the message.

        Returns:
            Tensors and metadata of the reply. The tensors are good until the next assignment.
        """
        try:
            return self._answer(blob, weights)
        except Exception as error:  # the one boundary: a fault is an answer, not a lost worker
            reason = (str(error).strip() or "no message").splitlines()[0]
            return {}, {"error": f"{type(error).__name__}: {reason}"}

    def _answer(
        self, blob: bytes, weights: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        set_threads(self.config.threads_per_client)
        started = time.perf_counter()
        task, tensors = Task.decode(blob)
        stage = self._federation.at(task.round)
        offsets = received(task.schedule, tensors)
        if task.keeps:
            self._refuse_unless_it_fits(task, stage, compensated=bool(offsets))
        costs = stage.costs_when(bool(offsets), task.calibrates, task.policy)
        bytes_down, up, down = len(blob), costs.bits_up, costs.bits_down
        in_place = weights is not None and not task.probes and down == PLAIN
        if weights is not None:
            bytes_down = task.whole_size(stage.arch, weights, tensors, down)
            if not in_place:
                tensors |= quantize(stage.arch, pack_for(stage.arch, weights, task.carried), down)
        elif task.cached is not None:
            names = parameter_cache.read(task.carried, task.digests)
            tensors = self.store.complete(stage.arch, task.carried, tensors, task.cached, names)
        tensors = dequantize(stage.arch, tensors, down)
        local = len(self._parts[1].partitions[task.client])
        if task.policy.in_turn:
            chosen = self._in_turn(task, local)
        else:
            chosen = self._order(task.client, task.round, local)[0][: task.examples]
        self.meter.start()
        result: dict[str, Tensor] = {}
        if task.probes:
            chosen, result = self._before(task, stage.arch, tensors, chosen)
            tensors = self._narrow(stage.arch, tensors, task.schedule)
        factor = self.config.rate_factor(task.round)
        options = self.options.under(task.policy).at(factor, task.policy.rate)
        model = self._parts[0]
        model.numerics, model.tokens = options.numerics(), task.policy.tokens
        if model.arch is not stage.arch:
            model.tune(stage.arch)
        source: dict[str, Tensor] | GlobalModel = tensors
        if weights is not None and in_place:
            source = self._laid_out(stage.arch, weights)
        reset = partial(model.reset, task.schedule, source, offsets)
        if stage.arch.rank:  # factors are multiplied out
            self.meter.count(reset)
        else:
            reset()
        del tensors, source, offsets  # the model has its own
        hostile, quantized = self.config.hostile(task.client), up < PLAIN
        before = self._values() if hostile or quantized else {}
        kept: dict[str, Tensor] = {}
        if quantized:  # as it came
            own = {n: t for n, t in before.items() if is_quantized(stage.arch.by_name[n], up)}
            kept = quantize(stage.arch, own, down)
            before = before if hostile else {}
            del own
        began = time.perf_counter()
        loss, trained = self._train(task, options, chosen, list(kept.values()))
        if hostile:
            for name, old in before.items():
                trained[name] = old + (trained[name] - old) * self.config.hostile_scale
        if quantized:
            draw = np.random.default_rng([*self._seed(task.client, task.round), 2])
            generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
            kept = dequantize(stage.arch, kept, down)
            trained |= quantize_changes(stage.arch, kept, trained, up, generator)
        reply = {
            "round": task.round,
            "client": task.client,
            "slot_examples": costs.slot_totals(task.examples),
            "loss": loss,
            "used": {
                "flops": self.meter.flops,
                "memory": self.meter.peak_bytes,
                "bytes_down": bytes_down,
                "seconds": _seconds_since(started),
                "training": _seconds_since(began),
            },
        }
        return result | trained, reply

    def _laid_out(self, arch: Architecture, weights: Mapping[str, Tensor]) -> GlobalModel:
        """The global model, laid out once a round."""
        if self._whole is None or self._whole[0] is not arch or self._whole[1] is not weights:
            self._whole = None  # the old one goes before a new one comes
            self._parts[0].let_go()
            self._whole = arch, weights, GlobalModel.of(arch, weights)
        return self._whole[2]

    def _before(
        self, task: Task, arch: Architecture, tensors: dict[str, Tensor], chosen: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Run the passes over the whole model.

        Args:
            chosen: Numbers of the examples to train on, if none are selected.

        Returns:
            Numbers of those that are, and scores as they travel.
        """
        model, data = self._parts
        result: dict[str, Tensor] = {}
        own = self._federation.arch
        whole = ProbeRunner(model, own, arch, tensors, self.options, self.meter)
        if task.probes.viewed:
            everyone = np.arange(len(data.partitions[task.client]))
            size = self.options.under(task.policy).batch_size
            batches = self._batches(task.client, everyone, size)
            unsure = whole.entropy(batches, self.config.selection_temperature)
            chosen = np.argsort(-unsure, kind="stable")[: task.examples]
        if task.probes.scored:
            batch = data.client_batch(task.client, chosen[: task.probes.scored], self.device)
            measured = whole.scores(*batch, task.probes.kinds)
            for kind, values in measured.items():
                result[TENSOR + kind] = torch.from_numpy(values).float()
        return chosen, result

    def _values(self) -> dict[str, Tensor]:
        """What will train, as it is before."""
        return {name: tensor.cpu().clone() for name, tensor in self._parts[0].update().items()}

    def _train(
        self, task: Task, options: LocalOptions, chosen: np.ndarray, beside: list[Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Follow the schedule over the chosen examples: the loss, and tensors as they travel.

        Args:
            beside: What else is held meanwhile.
        """
        model = self._parts[0]
        means = MeanTally(model) if task.calibrates else None
        epochs, size = self._epochs(task.client, task.round, chosen), options.batch_size
        smallest = (task.examples - 1) % size + 1
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            draw = np.random.default_rng(self._seed(task.client, task.round))
            torch.manual_seed(int(draw.integers(2**62)))  # of dropout
            loss = train(
                model,
                chain.from_iterable(self._batches(task.client, epoch, size) for epoch in epochs),
                options,
                self.rate,
                self.meter,
                [*beside, *(means.held() if means else ())],
                every_slot=smallest >= task.schedule.slots,
                prior=self._prior(task.client),
            )
        result = {name: tensor.cpu() for name, tensor in model.update().items()}
        return loss, result | (means.finish() if means else {})

    def _prior(self, client: int) -> Tensor | None:
        """What is added to a client's logits in its loss: float32 [classes].

        Each label counts once more than the client has it, so that none is impossible.
        """
        if not (weight := self.options.logit_adjustment):
            return None
        data = self._parts[1]
        own = data.train.labels[data.partitions[client]]
        counts = np.bincount(own, minlength=data.classes) + 1.0
        return torch.from_numpy(weight * np.log(counts / counts.sum())).float().to(self.device)

    def _refuse_unless_it_fits(self, task: Task, stage: Federation, compensated: bool) -> None:
        """Hold a plan against this client's budget, and the memory that is there.

        Raises:
            Refusal: Before anything has started.
        """
        costs = stage.costs_when(compensated, task.calibrates, task.policy)
        cost = round_cost(costs, task.schedule, task.examples, task.probes, task.cached)
        local = len(self._parts[1].partitions[task.client])
        budget = task.budget or self._budget(task.client, task.round)
        allowed = budget.capacity(stage.costs.full_cost(local))
        for resource, planned, most in zip(RESOURCES, cost.vector(), allowed, strict=True):
            if planned > most and resource in task.keeps:
                raise Refusal(f"the plan needs {planned} of {resource}, the budget allows {most}")
        if cost.memory > (free := free_memory(self.device)):
            raise Refusal(f"the plan needs {cost.memory} bytes of memory, {free} are free")

    def _seed(self, client: int, round_number: int) -> tuple[int, int, int]:
        return self.config.seed, round_number, client

    def _order(self, client: int, round_number: int, examples: int) -> list[np.ndarray]:
        """Each epoch's order of so many examples: a function of seed, round and client."""
        draw = np.random.default_rng([*self._seed(client, round_number), 1])
        return [draw.permutation(examples) for _ in range(self.options.epochs)]

    def _in_turn(self, task: Task, local: int) -> np.ndarray:
        """The examples whose turn it is in a round, if all rounds take as many."""
        order = np.random.default_rng([self.config.seed, task.client, 3]).permutation(local)
        start = (task.round - 1) * task.examples
        return order[np.arange(start, start + task.examples) % local]

    def _epochs(self, client: int, round_number: int, chosen: np.ndarray) -> list[np.ndarray]:
        """Each epoch's order of the chosen examples, which are numbers among the client's."""
        everything = self._order(client, round_number, len(self._parts[1].partitions[client]))
        return [epoch[np.isin(epoch, chosen)] for epoch in everything]

    def _batches(self, client: int, examples: np.ndarray, size: int) -> Batches:
        """Some of a client's examples, in batches of a size."""
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
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
            rows = [r for h in heads for r in range(p.starts[h], p.starts[h + 1])]
            out[name] = tensor[torch.tensor(rows, dtype=torch.long)]
        return out


def _seconds_since(started: float) -> str:
    """Of fixed width, so that the same run is the same number of bytes."""
    return f"{time.perf_counter() - started:012.3f}"
