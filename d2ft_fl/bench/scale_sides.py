"""What ``d2ft bench scale`` compares with: the bare floor, and plain Flower's FedAvg.

    python -c "from d2ft_fl.bench.scale_sides import main; main()" SIDE JOB

(not as ``__main__``, which workers would not find). SIDE is ``floor``, ``products`` for the floor
with the project's matrix products, or ``flower``; JOB is a :class:`Job` as JSON. Each round's
seconds go to standard output, a JSON line each, after a short round that is not timed. All train
the unmodified timm model, everything but its embedding, with AdamW, on the same images as the
project does, in as many processes of one thread as there are workers.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.federated_data import FederatedData, open_data
from d2ft_fl.engine.matmul import times, transposed_times
from d2ft_fl.models.build import build_adapter
from d2ft_fl.rounds.components import Components
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.torch_device import set_threads


@dataclass(frozen=True)
class Job:
    """What every side does.

    Attributes:
        model: Name of a timm model.
        image_size: Pixels a side; 0 keeps the model's own.
        clients: How many clients take part in a round.
        examples: Examples of each client, all of which it trains on once a round.
        batch_size: Examples of a step.
        rounds: Rounds that count; another one comes before them, short where it can be.
        workers: Processes that train.
    """

    model: str
    image_size: int
    clients: int
    examples: int
    batch_size: int
    rounds: int
    workers: int

    def config(self, **changes: Any) -> RunConfig:
        """Return the project's configuration of the job, everything FULL, with changed options."""
        base = RunConfig(
            strategy="fedavg",
            rounds=self.rounds + 1,
            clients=self.clients,
            dataset="made-up",
            train_examples=self.clients * self.examples,
            partitioner="Iid",
            partitioner_args="",
            model=self.model,
            pretrained="none",
            image_size=self.image_size,
            batch_size=self.batch_size,
            backward_score="magnitude",
            forward_score="magnitude",
            eval_every=self.rounds + 1,
            checkpoint_every=0,
        )
        return replace(base, **changes)

    def to_json(self) -> str:
        """Return the job as the command line takes it."""
        return write_json(asdict(self))


class Product(torch.autograd.Function):
    """A linear layer by :func:`~d2ft_fl.engine.matmul.times`, as the project multiplies."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``inputs @ weight.T + bias``: [..., columns]."""
        ctx.save_for_backward(inputs, weight)
        ctx.biased = bias is not None
        return times(inputs.flatten(0, -2), weight.t(), bias).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed of inputs, weight and bias."""
        inputs, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        through = times(rows, weight).view_as(inputs) if ctx.needs_input_grad[0] else None
        of_weight = transposed_times(rows, inputs.flatten(0, -2))
        return through, of_weight, rows.sum(0) if ctx.biased else None


def _by_product(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return Product.apply(inputs, layer.weight, layer.bias)


class Trainer:
    """A plain client, which trains the whole timm model for one epoch.

    Args:
        job: What to train.
        same_products: Whether linear layers multiply as the project does.
    """

    def __init__(self, job: Job, same_products: bool = False):
        config = job.config()
        set_threads(1)
        self.batch_size, self.config = job.batch_size, config
        adapter = build_adapter(Components(config).model_spec)
        self.model, arch = adapter.model, adapter.describe()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(arch.by_name[name].kind is not Kind.EMBEDDING)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if same_products:
            for layer in self.model.modules():
                if isinstance(layer, nn.Linear):
                    layer.forward = partial(_by_product, layer)  # type: ignore[method-assign]

    def batches(self, data: FederatedData, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a client's examples in batches, in order."""
        positions = torch.arange(len(data.partitions[client])).numpy()
        for start in range(0, len(positions), self.batch_size):
            yield data.client_batch(client, positions[start : start + self.batch_size])

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train one epoch from the weights that the model has."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.trained, lr=self.config.lr, weight_decay=0.0, fused=True)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            optimizer.step()


def data_of(job: Job) -> FederatedData:
    """Open the images of all clients."""
    components = Components(job.config())
    shape = build_adapter(components.model_spec).input_shape
    return open_data(components.data_spec(shape))


# -- the floor: plain processes that train and average -------------------------------------------


def floor(job: Job, same_products: bool = False) -> None:
    """Run rounds of plain processes, each of which trains its share of clients and sums changes.

    Args:
        job: What to do.
        same_products: Whether linear layers multiply as the project does.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(job.workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_floor_worker, args=(job, rank, theirs, same_products))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    shared = [pipe.recv() for pipe in pipes]  # sums of every process, in shared memory
    named = Trainer(job).model.named_parameters()
    weights = {n: p.detach().clone().share_memory_() for n, p in named}
    for pipe in pipes:
        pipe.send(weights)
    total = job.clients * job.examples
    for number in range(job.rounds + 1):
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send(job.clients if number else 1)
        for pipe in pipes:
            pipe.recv()
        for name, tensor in weights.items():
            tensor.add_(sum(sums[name] for sums in shared), alpha=1 / total)
        if number:
            print(write_json(time.perf_counter() - started), flush=True)
    for pipe in pipes:
        pipe.send(0)
    for process in processes:
        process.join()


def _floor_worker(job: Job, rank: int, pipe: Any, same_products: bool) -> None:
    trainer, data = Trainer(job, same_products), data_of(job)
    clients = range(rank, job.clients, job.workers)
    for client in clients:  # decoded before anything is timed
        next(trainer.batches(data, client))
    named = trainer.model.named_parameters()
    sums = {n: torch.zeros_like(p, requires_grad=False).share_memory_() for n, p in named}
    pipe.send(True)
    pipe.send(sums)
    weights = pipe.recv()
    while most := pipe.recv():
        for tensor in sums.values():
            tensor.zero_()
        for client in clients[:most]:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    parameter.copy_(weights[name])
            trainer.train(trainer.batches(data, client))
            examples = len(data.partitions[client])
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if parameter.requires_grad:
                        sums[name].add_(parameter - weights[name], alpha=examples)
        pipe.send(True)


# -- plain Flower, as its quickstart has it ------------------------------------------------------


@lru_cache(maxsize=1)
def _data(job: Job) -> FederatedData:
    return data_of(job)


def flower(job: Job) -> None:
    """Run rounds of Flower's own FedAvg, with a simulated SuperNode for each client."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        trainer = Trainer(job)  # as the quickstart does: a model for each message
        trainer.model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        client = int(context.node_config["partition-id"])
        trainer.train(trainer.batches(_data(job), client))
        metrics = MetricRecord({"num-examples": len(_data(job).partitions[client])})
        arrays = ArrayRecord(trainer.model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    class Timed(FedAvg):
        """FedAvg that prints how long its rounds take, all but the first, in which few train."""

        def configure_train(self, server_round: int, *args: Any) -> Any:
            self.expected = min(job.clients, job.workers) if server_round == 1 else job.clients
            self.fraction_train = self.expected / job.clients
            self.min_train_nodes = self.expected
            self.started = time.perf_counter()
            return super().configure_train(server_round, *args)

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            if any(reply.has_error() for reply in replies) or len(replies) != self.expected:
                raise RuntimeError("a client failed")
            aggregated = super().aggregate_train(server_round, replies)
            if server_round > 1:
                print(write_json(time.perf_counter() - self.started), flush=True)
            return aggregated

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_available_nodes=job.clients)
        initial = ArrayRecord(Trainer(job).model.state_dict())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=job.rounds + 1)

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, job.clients, backend_config=resources)


def main() -> None:
    """Run the side that the command line names."""
    sides: dict[str, Callable[[Job], None]]
    sides = {"floor": floor, "products": partial(floor, same_products=True), "flower": flower}
    sides[sys.argv[1]](Job(**json.loads(sys.argv[2])))
