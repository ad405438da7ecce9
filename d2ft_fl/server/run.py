"""A whole run: ask, plan, send, train, aggregate, record, round after round."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation import privacy
from d2ft_fl.aggregation.keyed_noise import noise_key
from d2ft_fl.aggregation.private_sums import PrivateRound, Trainers
from d2ft_fl.aggregation.releases import Releases
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.federated_data import FederatedData, open_data
from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.records.metrics import primary_of
from d2ft_fl.records.run_folder import Progress, claim_folder, only_one, read_rows
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.context import Assignment, Participant, plan_round
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.messages import encode_assignment
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.server import checkpoint
from d2ft_fl.server.dispatch import ClientFailure, RoundDispatch, Stopwatch
from d2ft_fl.server.recorder import Recorder, write_summary
from d2ft_fl.server.replies import RoundReplies
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.tasks.task import Batch, Outputs, Task, add_sums
from d2ft_fl.trackers import tracking
from d2ft_fl.util.torch_device import set_threads

log = logging.getLogger(__name__)


class ClientPool(Protocol):
    """The clients of a federation, wherever they run."""

    def clients(self, round_number: int) -> Mapping[int, int]:
        """Return the clients that can be asked before a round.

        Returns:
            Client -> a number that is another one when the client may have changed meanwhile.
        """

    def reports(
        self, round_number: int, clients: Sequence[int]
    ) -> tuple[list[Report], Mapping[int, ClientFailure]]:
        """Return reports of clients before a round, and why other clients do not report."""

    def train(
        self, work: RoundDispatch
    ) -> Iterable[tuple[int, bytes | memoryview | ClientFailure]]:
        """Have clients train; yield their replies as they arrive, in any order.

        A reply in shared memory is valid until the next one is asked for.
        """


def run(
    config: RunConfig,
    pool: ClientPool,
    progress: Progress = lambda row: None,
    report: bool = True,
) -> dict[str, Any]:
    """Run a federation from start to end; return the summary.

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
    with only_one(folder), tracking(Components(config).trackers, entries, folder) as trackers:

        def ended(row: dict[str, Any]) -> None:
            progress(row)
            trackers.round(row)

        summary = _run(config, pool, ended, folder)
        trackers.finish(summary)
    summary["trackers_switched_off"] = trackers.switched_off
    write_summary(folder, summary, report)
    return summary


def _run(config: RunConfig, pool: ClientPool, progress: Progress, folder: Path) -> dict[str, Any]:
    """Run all rounds, recorded in ``folder``; return the summary."""
    started = time.perf_counter()
    run = _Run(config, pool, folder)
    run.begin()
    while run.state.round < config.rounds:
        progress(run.round())
    return run.finish(time.perf_counter() - started)


class _Run:
    """A run between rounds: the federation's state, its clients' reports, and the record."""

    def __init__(self, config: RunConfig, pool: ClientPool, folder: Path):
        set_threads(config.threads_per_client)
        self.config, self.pool = config, pool
        self.components = Components(config)
        self.adapter = build_adapter(self.components.model_spec)
        self.data = open_data(self.components.data_spec(self.adapter.input_shape))
        self.federation = Federation(self.components, self.adapter.describe())
        model = self.adapter.model
        self.original = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.state = State(0, self.original)
        self.reports: dict[int, Report] = {}
        self.replays = False  # whether this round was begun before
        self.there: Mapping[int, int] = {}
        self.seconds_before = 0.0  # that a resumed run took so far
        model.to(self.components.device)
        self.recorder = Recorder(
            folder,
            self.federation,
            self.adapter,
            self.data.describe(private=self.components.privacy is not None),
        )
        self.budgets_vary = self.components.budget_source.varies
        self.privacy = self.components.privacy
        self.rounds_before = 0  # that a resumed run finished, those after its checkpoint too

    @cached_property
    def origin(self) -> str:
        """Digest of the weights that the run began with, for its checkpoints."""
        return checkpoint.digest_of(self.original)

    @cached_property
    def key(self) -> bytes:
        """Key of the noise and draws of private rounds."""
        return noise_key(self.config, self.recorder.folder)

    @cached_property
    def releases(self) -> Releases:
        """The noisy sums of private rounds that were released."""
        assert self.privacy is not None
        return Releases.of(self.privacy, self.recorder.folder, self.rounds_before)

    def begin(self) -> None:
        """Start the record, or take up a run where it was left."""
        if not self.config.resume:
            self.recorder.start()
            return
        loaded = checkpoint.load(self.recorder.folder, self.config, self.origin)
        rows = read_rows(self.recorder.folder)
        if loaded is not None:
            self.state, self.reports = loaded.state, dict(loaded.reports)
        elif len(rows) > self.config.checkpoint_every:
            raise ConfigError(
                f"resume = {self.config.resume!r} has {len(rows)} rounds and no checkpoint to go "
                "on from: start another run, with checkpoint-every = 1"
            )
        self.rounds_before = max(len(rows), self.state.round)
        self.recorder.resume(self.state.round)
        self.seconds_before = self.recorder.seconds

    def round(self) -> dict[str, Any]:
        """Run the next round, again if too few clients answer and that is asked for.

        Returns:
            The line of the round in ``rounds.jsonl``.
        """
        config, number = self.config, self.state.round + 1
        started, stopwatch, failures = time.perf_counter(), Stopwatch(), []
        for attempt in range(1, config.attempts + 1):
            stage, plan, replies = self._replies(number, stopwatch)
            outcomes = replies.outcomes
            if outcomes.answered >= min(config.min_replies, replies.asked):
                break
            few = (
                f"{outcomes.answered} of {replies.asked} clients answered in round {number}, "
                f"min-replies = {config.min_replies}{_first_failure(outcomes.failures)}"
            )
            self._mistrust(replies)
            if config.few_replies == "stop" or attempt == config.attempts:
                raise RunError(self._public(few, number))
            log.warning("%s; the round is repeated", few)
            failures += [f"attempt {attempt}: {failure}" for failure in outcomes.failures]
        with stopwatch.of("fold"):
            self.state, records = replies.finish()
        last = number == config.rounds
        figures = None
        if last or number % config.eval_every == 0:
            with stopwatch.of("evaluate"):
                weights = stage.model_weights(self.state)
                figures = self._evaluate(weights)
        wall = time.perf_counter() - started
        row = self.recorder.round(
            stage, self.state, replies.plan, records, figures, wall, failures + outcomes.strays,
            stopwatch.seconds, plan if self.privacy else None,
        )  # fmt: skip
        if config.checkpoint_every and (last or number % config.checkpoint_every == 0):
            self._save()
        return row

    def _public(self, reason: str, number: int) -> str:
        """Return why a run fails as its page and trackers say it; with noise, without clients."""
        if not self.privacy:
            return reason
        log.warning("%s", reason)
        least = self.config.min_replies
        return (
            f"fewer than min-replies = {least} clients answered in round {number}; the log says who"
        )

    def _mistrust(self, replies: RoundReplies) -> None:
        """Take the caches of clients that failed for empty: a gap may be why they failed."""
        failed = {client for client, record in replies.outcomes.records.items() if record.failure}
        cached = {c: subnets for c, subnets in self.state.cached.items() if c not in failed}
        if len(cached) < len(self.state.cached):
            self.state = replace(self.state, cached=cached)
            if self.config.checkpoint_every:  # a process that resumes must not rely on them either
                self._save()

    def _save(self) -> None:
        saved = checkpoint.Checkpoint(self.state, self.reports)
        checkpoint.save(self.recorder.folder, self.config, self.origin, saved)

    def _replies(self, number: int, stopwatch: Stopwatch) -> tuple[Federation, Plan, RoundReplies]:
        """Ask, plan, send and aggregate: a round up to where its state is made.

        Returns:
            The federation of the round, the plan of all clients, and the replies of those that take
            part: all, or those drawn in a private round.
        """
        config = self.config
        stage = self.federation.at(number)
        state = stage.prepared(self.state, self.original)
        if self.privacy:  # what clients have cached tells who was drawn
            state = replace(state, cached={})
        with stopwatch.of("ask"):
            reports, silent = self._ask(number)
        if not reports:
            raise RunError(f"no client answered in round {number}{_first_silent(silent)}")
        with stopwatch.of("plan"):
            everybody = plan_round(stage, state, reports)
            plan, private = self._drawn(everybody) if self.privacy else (everybody, None)
            self.recorder.plan(everybody)
        assignments = {
            a.client: (c, a)
            for c, a in zip(plan.clients, plan.assignments, strict=True)
            if not a.schedule.sits_out
        }
        if not everybody.working and number == 1:  # later, budgets may come back
            raise RunError(
                f"every client sits out round {number}: no budget affords one subnet; raise the "
                f"budgets ({config.budgets!r}) or take a smaller model or batch-size"
            )
        replies = RoundReplies(stage, state, plan, silent, private)
        work = RoundDispatch(
            number,
            {client: a.cost.work for client, (_, a) in assignments.items()},
            state.weights,
            partial(self._message, stage, state, assignments),
            stopwatch,
        )
        for client, reply in self.pool.train(work) if assignments else ():
            if isinstance(reply, ClientFailure):
                replies.fail(client, reply.reason)
            else:
                with stopwatch.of("fold"):
                    replies.add(client, reply)
        replies.complete()
        return stage, everybody, replies

    def _message(
        self,
        stage: Federation,
        state: State,
        assignments: dict[int, tuple[Participant, Assignment]],
        client: int,
        shared: bool,
    ) -> bytes:
        participant, assignment = assignments[client]
        matched = bool(self.config.match)
        # A round that is begun again keeps to the reports it had, whatever clients report now; its
        # messages are as long as they were.
        budget = participant.budget if matched or self.budgets_vary else None
        return encode_assignment(stage, state, assignment, budget, matched or self.replays, shared)

    def _drawn(self, plan: Plan) -> tuple[Plan, PrivateRound]:
        """Return the part of a plan for the clients that are drawn, and what of it may be known."""
        assert self.privacy is not None
        trainers = Trainers.of(
            [(a.schedule, a.examples or 0) for a in plan.assignments], self.privacy.rate
        )
        chosen = privacy.drawn(self.privacy, self.key, plan.round, [c.client for c in plan.clients])
        return plan.only(chosen), PrivateRound(self.releases, self.key, plan.round, trainers)

    def _ask(self, number: int) -> tuple[list[Report], Mapping[int, ClientFailure]]:
        """Return reports of the clients that take part in a round, and why others do not report."""
        there = self.pool.clients(number)
        # Plans of private rounds are for all, so that none tells who else was drawn.
        chosen = sorted(there) if self.privacy else drawn(self.config, number, there)
        known = {} if self.budgets_vary else self.reports
        if self.there:  # else they are as the checkpoint has them
            known = {c: r for c, r in known.items() if there.get(c) == self.there.get(c)}
        self.there = there
        silent: Mapping[int, ClientFailure] = {}
        replayed = self.recorder.next_reports(number)
        self.replays = replayed is not None
        if replayed is not None:
            return replayed, silent
        if missing := [client for client in chosen if client not in known]:
            fresh, silent = self.pool.reports(number, missing)
            known = {**known, **{r.client: r for r in fresh}}
        self.reports = known
        reports = [known[client] for client in chosen if client in known]
        if self.budgets_vary:
            self.recorder.reports(number, reports)
        return reports, silent

    def finish(self, wall_seconds: float) -> dict[str, Any]:
        """Write the results of the run; return the summary."""
        stage, state = self.federation.at(self.state.round), self.state
        stage.tuning.save(self.recorder.folder, state.weights, stage.arch, self.original)
        weights, last = stage.model_weights(state), self.recorder.rows[-1]
        if primary_of(last) is None:  # of a run that ends before it was meant to
            metrics = MetricSpec.of(self.components.task)
            last |= metrics.entries(self._evaluate(weights))
        return self.recorder.finish(weights, self.seconds_before + wall_seconds)

    def _evaluate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the task's figures of a global model on the held-out split."""
        size, task = self.config.eval_batch_size, self.components.task
        return evaluate(self.adapter, weights, task, self.data, size)


def drawn(config: RunConfig, round_number: int, clients: Iterable[int]) -> list[int]:
    """Draw who takes part in a round: all of ``clients``, or as many as are sampled, in order."""
    ordered = sorted(clients)
    if not config.sample_clients or config.sample_clients >= len(ordered):
        return ordered
    draw = np.random.default_rng([config.seed, round_number, 3])
    places = draw.choice(len(ordered), config.sample_clients, replace=False)
    return [ordered[place] for place in sorted(places)]


def _first_failure(failures: Sequence[str]) -> str:
    return f"; the first said: {failures[0]}" if failures else ""


def _first_silent(silent: Mapping[int, ClientFailure]) -> str:
    return next((f"; client {c} said: {failure.reason}" for c, failure in silent.items()), "")


@torch.no_grad()
def evaluate(
    adapter: ModelAdapter,
    weights: Mapping[str, Tensor],
    task: Task,
    data: FederatedData,
    batch_size: int,
) -> dict[str, float]:
    """Compute the task's figures of the global model on the held-out split.

    Args:
        adapter: Runs the model, whose weights are overwritten.
        weights: The global model, by name.
        task: What is learnt.
        data: Holds the held-out split.
        batch_size: Examples that are run together.
    """
    for name, parameter in adapter.model.named_parameters():
        parameter.copy_(weights[name])
    device = next(adapter.model.parameters()).device
    totals: dict[str, Tensor] = {}
    for batch in _test_batches(task, data, batch_size):
        batch = batch.to(device)
        totals = add_sums(totals, task.sums(Outputs(adapter.forward(batch.inputs)), batch))
    return task.figures(totals)


def _test_batches(task: Task, data: FederatedData, size: int) -> Iterator[Batch]:
    for start in range(0, data.test_size, size):
        yield task.collate(data.test_batch(start, start + size))
