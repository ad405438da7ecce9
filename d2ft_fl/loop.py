"""A whole run: ask, plan, send, train, fold, record, round after round."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_fl import timm_vit
from d2ft_fl.config import RunConfig
from d2ft_fl.data import FederatedData, open_data
from d2ft_fl.errors import RunError
from d2ft_fl.federation import Federation, Report, State
from d2ft_fl.fold import Fold
from d2ft_fl.meter import set_threads
from d2ft_fl.models import build_model
from d2ft_fl.recorder import Recorder, claim_folder, write_summary
from d2ft_fl.rounds import Assignment, Participant, plan_round
from d2ft_fl.tasks import encode_assignment
from d2ft_fl.trackers import tracking


@dataclass(frozen=True)
class Fault:
    """A client that did not answer, and why."""

    reason: str


class Pool(Protocol):
    """The clients of a federation, wherever they run."""

    def reports(self, round: int) -> list[Report]:
        """What every client says of itself before a round."""

    def train(
        self, clients: list[int], assignment: Callable[[int], bytes]
    ) -> Iterable[tuple[int, bytes | Fault]]:
        """Have these clients train; yields their replies as they arrive, in any order.

        ``assignment`` makes a client's message when it is about to be sent.
        """


Progress = Callable[[dict[str, Any]], None]


def run(
    config: RunConfig,
    pool: Pool,
    progress: Progress = lambda row: None,
    report: bool = True,
) -> dict[str, Any]:
    """Run a federation from start to end; returns the summary.

    Args:
        config: A checked configuration.
        pool: The clients.
        progress: Called with each round's line.
        report: Whether to write the run's page at its end; a sweep has one for all its runs.

    Raises:
        RunError: When no client can do anything, or all fail, or a tracker cannot be started.
    """
    folder = claim_folder(config)
    entries = config.to_mapping() | {"run-folder": str(folder)}
    with tracking(config.load_trackers(), entries, folder) as trackers:

        def ended(row: dict[str, Any]) -> None:
            progress(row)
            trackers.round(row)

        summary = _run(config, pool, ended, folder)
        trackers.finish(summary)
    summary["trackers_switched_off"] = trackers.switched_off
    write_summary(folder, summary, report)
    return summary


def _run(config: RunConfig, pool: Pool, progress: Progress, folder: Path) -> dict[str, Any]:
    """All rounds, recorded in ``folder``; returns the summary."""
    set_threads(config.threads_per_client)
    started = time.perf_counter()
    model = build_model(config.model_spec())
    arch = timm_vit.describe(model)
    channels, side = timm_vit.input_shape(model)
    data = open_data(config.data_spec(side, channels))
    federation = Federation(config, arch)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = State(0, original)
    model.to(config.torch_device())
    recorder = Recorder(folder, federation, config.model_spec())
    recorder.start()

    budgets_vary = config.budget_source().varies
    reports: list[Report] = []
    for number in range(1, config.rounds + 1):
        round_started = time.perf_counter()
        if not reports or budgets_vary:
            reports = pool.reports(number)
        stage = federation.at(number)
        state = stage.prepared(state, original)
        plan = plan_round(stage, state, reports)
        recorder.plan(plan)
        assignments = {
            a.client: (c, a)
            for c, a in zip(plan.clients, plan.assignments, strict=True)
            if not a.schedule.sits_out
        }
        if not assignments and number == 1:  # later, budgets may come back
            raise RunError(
                f"every client sits out round {number}: no budget affords one subnet; raise the "
                f"budgets ({config.budgets!r}) or take a smaller model or batch-size"
            )
        fold = Fold(stage, state, plan)

        message = partial(_message, stage, state, assignments)
        for client, reply in pool.train(list(assignments), message):
            if isinstance(reply, Fault):
                fold.fail(client, reply.reason)
            else:
                fold.add(client, reply)
        state, records = fold.finish()
        faults = [f"client {r.client}: {r.fault}" for r in records if r.fault]
        if faults and all(r.used is None for r in records):
            raise RunError(f"no client answered in round {number}; the first said: {faults[0]}")
        weights = stage.model_weights(state)
        accuracy, loss = evaluate(model, weights, data, config.eval_batch_size)
        row = recorder.round(
            stage, state, plan, records, accuracy, loss, time.perf_counter() - round_started
        )
        progress(row)
    if save := getattr(stage.tuning, "save", None):
        save(recorder.folder, state.weights, stage.arch, config, original)
    return recorder.finish(weights, time.perf_counter() - started)


def _message(
    federation: Federation,
    state: State,
    assignments: dict[int, tuple[Participant, Assignment]],
    client: int,
) -> bytes:
    participant, assignment = assignments[client]
    budget = participant.budget if federation.config.match else None
    return encode_assignment(federation, state, assignment, budget)


@torch.no_grad()
def evaluate(
    model: timm_vit.VisionTransformer,
    weights: Mapping[str, Tensor],
    data: FederatedData,
    batch_size: int,
) -> tuple[float, float]:
    """Accuracy and mean loss of the global model on the held-out split."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    right, loss = 0, 0.0
    device = next(model.parameters()).device
    for images, labels in _test_batches(data, batch_size):
        images, labels = images.to(device), labels.to(device)
        logits = model(images)  # [batch, classes]
        right += int((logits.argmax(dim=1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return right / data.test_size, loss / data.test_size


def _test_batches(data: FederatedData, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, data.test_size, size):
        yield data.test_batch(start, start + size)
