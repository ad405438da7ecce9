"""The client's side of a round: report what it can afford, and train what it is assigned.

One client trainer serves any number of clients in turn. It builds its model and decodes its data
once a process, and resets the model in place for each message.
"""

import math
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
from d2ft_fl.budgets.process_memory import MESSAGES, resident, told
from d2ft_fl.budgets.sources import MEASURED
from d2ft_fl.client.examples import LocalExamples
from d2ft_fl.client.job import Job, narrowed
from d2ft_fl.client.refusals import refuse_unless_it_fits, refuse_what_is_not_here
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.data.federated_data import FederatedData, open_data
from d2ft_fl.data.labels import digest_of, listed
from d2ft_fl.engine.mean_tally import MeanTally
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import Offsets, PartialModel
from d2ft_fl.engine.probes import ProbeRunner
from d2ft_fl.engine.trainer import train
from d2ft_fl.errors import ConfigError, Divergence
from d2ft_fl.models.build import build_adapter
from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Federation, Report
from d2ft_fl.rounds.messages import Message
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.packing import GlobalModel
from d2ft_fl.util.torch_device import set_threads, warm_up
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire.parameter_cache import ParameterCache
from d2ft_fl.wire.quantization import Arriving


@lru_cache(maxsize=1)
def client_trainer(config: RunConfig) -> "ClientTrainer":
    """Return the client trainer of this process for a run."""
    return ClientTrainer(config)


class ClientTrainer:
    """Trains for any number of clients, one after another, under one configuration.

    Args:
        config: The options of the run.
        owns_budget: Whether the clients' budget was set where they are: then they keep all of it,
            whatever a plan promises and whatever budget it was made for.
        on_device: Whether budgets are of the device that this process runs on, and it is no
            simulation of another.
    """

    def __init__(self, config: RunConfig, owns_budget: bool = False, on_device: bool = False):
        self.config, self.owns_budget = config, owns_budget
        self.on_device = on_device or config.budgets == MEASURED
        self.components = Components(config)
        self.options = self.components.training
        self.device = self.components.device
        self.rate = self.components.tuning.learning_rate
        self.meter = Meter(verify=config.verify_costs, device=self.device)
        self.budgets = self.components.budget_source
        self.store = ParameterCache.default()
        self.store.prune()
        self._taken: int | None = None  # bytes of this process beside tensors of a round
        # A round's architecture and global model, and this as it arrives by the bits it travels in.
        self._laid_out: tuple[Architecture, Mapping[str, Tensor], dict[int, Arriving]] | None = None

    @cached_property
    def _adapter(self) -> ModelAdapter:
        """The model of the configuration; weights come with every message."""
        return build_adapter(replace(self.components.model_spec, pretrained="none"))

    @cached_property
    def data(self) -> FederatedData:
        """The data set, and which examples are whose."""
        return open_data(self.components.data_spec(self._adapter.input_shape))

    @cached_property
    def examples(self) -> LocalExamples:
        """Which examples clients train on, in which order."""
        return LocalExamples(
            self.data, self.components.task, self.config.seed, self.options.epochs, self.device,
            self.config.flips_labels,
        )  # fmt: skip

    @cached_property
    def model(self) -> PartialModel:
        """The model that trains, reset for every message."""
        warm_up(self.device)
        arch = self._federation.arch
        return PartialModel(self._adapter, arch, Numerics.of(self.options), self.device)

    @cached_property
    def _federation(self) -> Federation:
        return Federation(self.components, self._adapter.describe())

    def report(self, client: int, round_number: int) -> Report:
        """Return what the server learns of a client before a round: its examples and budget.

        The model is built by then, so that no round waits for it.
        """
        self._get_ready()
        taken = None if self._taken is None else told(self._taken)
        budget = self._budget(client, round_number).on(self.device.type, taken)
        return Report(client, self.examples.count(client), budget)

    def check_classes(self, digest: str) -> None:
        """Check that this client numbers classes as the run does.

        Args:
            digest: Of the run's classes; empty where there is nothing to compare.

        Raises:
            ConfigError: When its data have other classes, or the same in another order.
        """
        names = self.components.class_names
        if digest and digest != digest_of(names):
            raise ConfigError(
                f"the data of this node have the classes {listed(names)}, which are not the run's "
                "in number and order: list those of the run in its option classes"
            )

    def _budget(self, client: int, round_number: int) -> Budget:
        clients = len(self.data.partitions)
        description = ClientDescription(client, self.examples.count(client), clients)
        return self.budgets(description, round_number)

    def _get_ready(self, message: bytes = b"") -> None:
        """Have what every round needs: the model and the data; note what the process takes then.

        Args:
            message: The message that has come, which is counted apart.
        """
        _ = self.model, self.data
        if self._taken is None and self.on_device:
            self._taken = resident() - len(message)
            if self.config.transport == "message":  # the whole model, at most
                parameters = self._adapter.model.parameters()
                self._taken += MESSAGES * sum(p.numel() * p.element_size() for p in parameters)

    def work(
        self,
        blob: bytes,
        weights: Mapping[str, Tensor] | None = None,
        asked: tuple[int, int] | None = None,
    ) -> bytes:
        """Carry one message out and return the encoded reply. See :meth:`answer`."""
        return wire.encode(*self.answer(blob, weights, asked))

    def answer(
        self,
        blob: bytes,
        weights: Mapping[str, Tensor] | None = None,
        asked: tuple[int, int] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Carry one message out. An exception becomes a reply that names it.

        Args:
            blob: The message, as :func:`~d2ft_fl.rounds.messages.encode_assignment` writes it.
            weights: The global model, where it is at hand and did not come with the message.
            asked: The round and the client that the message has to be of; None for any.

        Returns:
            Tensors and metadata of the reply. The tensors are good until the next message.
        """
        try:
            return self._answer(blob, weights, asked)
        except Exception as error:  # the one boundary: a failure is an answer, not a lost process
            reason = (str(error).strip() or "no message").splitlines()[0]
            return {}, {"error": f"{type(error).__name__}: {reason}"}

    def _answer(
        self, blob: bytes, weights: Mapping[str, Tensor] | None, asked: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Carry one message out, step by step; arguments and result of :meth:`answer`."""
        set_threads(self.config.threads_per_client)
        started = time.perf_counter()
        self._get_ready(blob)  # before memory is read, and before anything is measured
        job, tensors, offsets = Job.read(blob, self._federation, weights is not None)
        local = self.examples.count(job.message.client)
        refuse_what_is_not_here(job.message, asked, local)
        if job.message.keeps or self.owns_budget:
            budgets = self._kept_budgets(job.message)
            refuse_unless_it_fits(job, budgets, local, self._taken, self.device)
        bytes_down = job.bytes_down(blob, tensors, weights)
        whole = None if weights is None else self._lay_out(job, weights)
        tensors = job.complete(tensors, self.store) if whole is None else whole.model.tensors
        chosen = self.examples.choose(job.message)
        self.meter.start()
        scores: dict[str, Tensor] = {}
        if job.message.probes:
            chosen, scores = self._probe(job, tensors, chosen)
            if whole is None:
                tensors = narrowed(job.arch, tensors, job.message.schedule)
        options = self._training_options(job.message)
        self._load(job, tensors if whole is None else whole.model, offsets, options)
        del tensors, offsets  # the model has copies
        sent_down = self._sent_down(job, whole)
        training_started = time.perf_counter()
        loss, trained = self._train_and_pack(job, options, chosen, sent_down)
        reply = {
            "round": job.message.round,
            "client": job.message.client,
            "slot_examples": job.costs.slot_totals(job.message.examples),
            "loss": loss,
            "used": {
                "flops": self.meter.flops,
                "memory": self.meter.peak_bytes,
                "bytes_down": bytes_down,
                "seconds": _seconds_since(started),
                "training": _seconds_since(training_started),
            },
        }
        return scores | trained, reply

    def _kept_budgets(self, message: Message) -> list[tuple[Budget, tuple[str, ...]]]:
        """Return the budgets that a plan is held against, each with what of it has to be kept."""
        budgets = [(message.budget, message.keeps)] if message.budget else []
        if self.owns_budget or not budgets:
            own = self._budget(message.client, message.round)
            budgets.append((own, RESOURCES if self.owns_budget else message.keeps))
        return budgets

    def _probe(
        self, job: Job, tensors: dict[str, Tensor], chosen: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Run the probes over the whole model: select examples, and score subnets.

        Args:
            job: The message.
            tensors: Packed slices of every head by name.
            chosen: Numbers of the examples to train on, if none are selected.

        Returns:
            Numbers of the examples to train on, and scores as they travel.
        """
        message, probes = job.message, job.message.probes
        scores: dict[str, Tensor] = {}
        runner = ProbeRunner(
            self.model, self._federation.arch, job.arch, tensors, self.options, self.meter
        )
        if probes.viewed:
            everyone = np.arange(self.examples.count(message.client))
            size = self.options.under(message.policy).batch_size
            batches = self.examples.batches(message.client, everyone, size)
            entropy = runner.entropy(batches, self.config.selection_temperature)
            chosen = np.argsort(-entropy, kind="stable")[: message.examples]
        if probes.scored:
            batch = self.examples.batch(message.client, chosen[: probes.scored])
            for kind, values in runner.scores(batch, self.components.task, probes.kinds).items():
                scores[TENSOR + kind] = torch.from_numpy(values).float()
        return chosen, scores

    def _training_options(self, message: Message) -> TrainingOptions:
        """Return the options of training under a message's execution policy, in its round."""
        factor = self.config.rate_factor(message.round)
        return self.options.under(message.policy).at(factor, message.policy.rate)

    def _load(
        self,
        job: Job,
        source: dict[str, Tensor] | GlobalModel,
        offsets: dict[int, Offsets],
        options: TrainingOptions,
    ) -> None:
        """Reset the model to what a message's schedule needs, with the values that came."""
        model = self.model
        model.numerics, model.tokens = Numerics.of(options), job.message.policy.tokens
        if model.arch is not job.arch:
            model.tune(job.arch)
        reset = partial(model.reset, job.message.schedule, source, offsets)
        if job.arch.rank:  # LoRA's factors are multiplied out, which costs FLOPs
            self.meter.count(reset)
        else:
            reset()

    def _lay_out(self, job: Job, weights: Mapping[str, Tensor]) -> Arriving:
        """Return the global model as it arrives, laid out for taking slices, once a round."""
        arch, bits, laid_out = job.arch, job.costs.bits_down, self._laid_out
        if laid_out is None or laid_out[0] is not arch or laid_out[1] is not weights:
            self._laid_out = laid_out = None  # the old one goes before a new one comes
            self.model.let_go()
            self._laid_out = laid_out = arch, weights, {}
        if bits not in laid_out[2]:
            laid_out[2][bits] = Arriving.of(arch, weights, bits)
        return laid_out[2][bits]

    def _sent_down(self, job: Job, whole: Arriving | None) -> dict[str, Tensor]:
        """Copy the values, before training, of packed slices whose changes travel quantized.

        Nothing else is copied: copies take memory while the model trains.

        Args:
            job: The message.
            whole: The global model, where it is at hand.

        Returns:
            The slices by name, as they came down.
        """
        if not job.quantizes_changes:
            return {}
        return job.as_sent_down(self._values()) if whole is None else job.taken_from(whole)

    def _train_and_pack(
        self,
        job: Job,
        options: TrainingOptions,
        chosen: np.ndarray,
        sent_down: dict[str, Tensor],
    ) -> tuple[float, dict[str, Tensor]]:
        """Train the model as it is loaded, and make of the result what travels back.

        Changes are quantized where the message says so.

        Args:
            job: The message.
            options: How the client trains.
            chosen: Numbers of the examples, among the client's: [examples].
            sent_down: Values that quantized changes are counted from, by name.

        Returns:
            The mean loss, and tensors by name, as they travel.
        """
        message = job.message
        loss, trained = self._train(message, options, chosen, list(sent_down.values()))
        if job.quantizes_changes:
            seed = self.examples.seed_of(message.client, message.round)
            trained |= job.quantized_changes(sent_down, trained, seed)
        return loss, trained

    def _values(self) -> dict[str, Tensor]:
        """Copy the packed slices of what trains, by name."""
        return {name: tensor.cpu().clone() for name, tensor in self.model.update().items()}

    def _train(
        self, message: Message, options: TrainingOptions, chosen: np.ndarray, others: list[Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Follow the schedule over the chosen examples.

        Args:
            message: What the client is told to do.
            options: How it trains.
            chosen: Numbers of the examples, among the client's: [examples].
            others: Tensors that are in memory meanwhile, for the meter.

        Returns:
            The mean loss, and packed slices and measured means by name, as they travel.
        """
        model = self.model
        means = MeanTally(model) if message.calibrates else None
        epochs, size = (
            self.examples.epochs(message.client, message.round, chosen),
            options.batch_size,
        )
        smallest = (message.examples - 1) % size + 1
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            draw = np.random.default_rng(self.examples.seed_of(message.client, message.round))
            torch.manual_seed(int(draw.integers(2**62)))  # of dropout
            loss = train(
                model,
                chain.from_iterable(
                    self.examples.batches(message.client, epoch, size) for epoch in epochs
                ),
                self.examples.task_of(message.client),
                options,
                self.rate,
                self.meter,
                [*others, *(means.held() if means else ())],
                every_slot=smallest >= message.schedule.slots,
            )
        if not math.isfinite(loss):
            raise Divergence(
                f"the loss of client {message.client} is not finite: training diverges at "
                f"{self.config.learning_rates}"
            )
        result = {name: tensor.cpu() for name, tensor in model.update().items()}
        return loss, result | (means.finish() if means else {})


def _seconds_since(started: float) -> str:
    """Format elapsed seconds at a fixed width, so that a reply's bytes depend on no clock."""
    return f"{time.perf_counter() - started:012.3f}"
