"""Writing the run folder. It holds JSON, safetensors and pictures; nothing is pickled.

config.toml              the resolved configuration
rounds.jsonl             one line for each round, see :mod:`d2ft_fl.records.round_line`
clients.jsonl            one line for each client and round
private.jsonl            of a run with noise: what clients did, measured, a line a round; in
                         rounds.jsonl, clients.jsonl, plans and what is made of them stands what was
                         planned for all clients (:mod:`d2ft_fl.aggregation.privacy`)
releases.jsonl           of such a run, see :mod:`d2ft_fl.aggregation.releases`; both are for the
                         owner alone
reports.jsonl            what clients reported before each round, where reports vary
checkpoints/             what the run needs to go on, see :mod:`d2ft_fl.server.checkpoint`
plans/round-001.safetensors   int8 schedules [clients, slots, blocks, heads]; where clients train
                         LoRA at different ranks, int64 ranks [clients, blocks, heads]
plan.png                 picture of the last round's plan
model.safetensors, model.json   the final model, a timm state dict and how to build it
summary.json             totals, and the comparison with full fine-tuning
status.json              running, finished or failed, and why
data.json                classes by their numbers, examples of each, what was left out and why
versions.json            versions of packages, the machine, the commit of the code
report.html              the run's page, see :mod:`d2ft_fl.report`; trials of a sweep have none
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.errors import RunError
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.records.round_line import planned_line, round_line
from d2ft_fl.records.run_folder import read_rows, write_status
from d2ft_fl.records.summary import summarise
from d2ft_fl.records.versions import versions
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.server.outcomes import Outcomes
from d2ft_fl.util.files import (
    ANYBODY,
    OWNER,
    append_lines,
    keep_lines,
    read_lines,
    write_whole,
    writing,
)
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.util.toml import dump_toml

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
PRIVATE = "private.jsonl"
# Of finished rounds, and their modes.
LINES = {"rounds.jsonl": ANYBODY, "clients.jsonl": ANYBODY, PRIVATE: OWNER}


def _writes(
    method: Callable[Concatenate["Recorder", P], R],
) -> Callable[Concatenate["Recorder", P], R]:
    """Have a method name the run folder where it cannot be written to."""

    @wraps(method)
    def named(self: "Recorder", *args: P.args, **kwargs: P.kwargs) -> R:
        with writing(self.folder):
            return method(self, *args, **kwargs)

    return named


@dataclass
class Recorder:
    """Writes the folder of one run as the run goes on. Where it cannot, that is a ``RunError``.

    Attributes:
        folder: The run folder.
        federation: The federation, of no round in particular.
        adapter: The model, which writes itself.
        data: What ``data.json`` says.
        rows: Lines of ``rounds.jsonl`` so far.
    """

    folder: Path
    federation: Federation
    adapter: ModelAdapter
    data: Mapping[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _reported: dict[int, list[Any]] = field(default_factory=dict)

    @_writes
    def start(self) -> None:
        """Make the folder; write the configuration and versions into it."""
        self._describe()
        for name in ("rounds.jsonl", "clients.jsonl"):
            self.folder.joinpath(name).write_text("")
        write_status(self.folder, "running")

    @_writes
    def resume(self, rounds: int) -> None:
        """Continue the record of a run, without what came after some number of rounds.

        Args:
            rounds: How many rounds the checkpoint has.

        Raises:
            RunError: When the record has fewer rounds.
        """
        self._describe()
        self.rows = [row for row in read_rows(self.folder) if row["round"] <= rounds]
        if len(self.rows) != rounds:
            raise RunError(
                f"rounds.jsonl has {len(self.rows)} whole lines, the checkpoint is of round "
                f"{rounds}: the run in {str(self.folder)!r} cannot be resumed"
            )
        for name, mode in LINES.items():
            keep_lines(self.folder / name, rounds, mode)
        for line in read_lines(self.folder / "reports.jsonl"):
            if line["round"] > rounds and line["reports"]:  # where nobody answered, all are asked
                self._reported.setdefault(line["round"], []).append(line["reports"])
        self.folder.joinpath("summary.json").unlink(missing_ok=True)
        write_status(self.folder, "running")

    def _describe(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.joinpath("plans").mkdir(exist_ok=True)
        entries = self.federation.config.to_mapping() | {"run-folder": str(self.folder)}
        write_whole(self.folder / "config.toml", dump_toml(entries | {"resume": ""}))
        self.folder.joinpath("data.json").write_text(write_json(self.data, indent=2) + "\n")
        made_with = versions(self.federation.config.device)
        self.folder.joinpath("versions.json").write_text(write_json(made_with, indent=2) + "\n")

    @_writes
    def reports(self, round_number: int, reports: Sequence[Report]) -> None:
        """Record what clients reported before a round; for runs whose budgets vary by round."""
        lines = [[r.client, r.examples, r.budget.to_json()] for r in reports]
        path = self.folder / "reports.jsonl"
        append_lines(path, [{"round": round_number, "reports": lines}])

    def next_reports(self, round_number: int) -> list[Report] | None:
        """Return what clients reported when a round was begun before this run was resumed.

        The first call returns the reports of the first attempt, the next those of the second. None
        means that clients have to be asked.
        """
        attempts = self._reported.get(round_number)
        if not attempts:
            return None
        return [Report(c, n, Budget.from_json(b)) for c, n, b in attempts.pop(0)]

    @_writes
    def plan(self, plan: Plan) -> None:
        """Record the schedules of a round."""
        path = self.folder / "plans" / f"round-{plan.round:03d}.safetensors"
        tensors = {
            "schedules": torch.from_numpy(plan.schedules()),
            "clients": torch.tensor([c.client for c in plan.clients]),
        }
        ranks = plan.ranks(self.federation.at(plan.round).arch.rank)
        if ranks is not None:
            tensors["ranks"] = torch.from_numpy(ranks)
        safetensors.torch.save_file(tensors, path)

    @_writes
    def round(
        self,
        federation: Federation,
        state: State,
        plan: Plan,
        records: list[ClientRecord],
        figures: Mapping[str, float] | None,
        wall_seconds: float,
        strays: Sequence[str] = (),
        stopwatch: Mapping[str, float] | None = None,
        everybody: Plan | None = None,
    ) -> dict[str, Any]:
        """Record a finished round; returns its line.

        Args:
            federation: The federation in this round.
            state: The state that the round ended with.
            plan: The plan that clients followed.
            records: What became of each client.
            figures: The task's figures of the global model; None where it was not evaluated.
            wall_seconds: Time that the round took here.
            strays: Failures of clients that had nothing to do.
            stopwatch: Seconds of the round by what the server did in them.
            everybody: Of a round with noise the plan of all clients, drawn or not; None of others.
        """
        row = round_line(federation, state, plan, records, figures, wall_seconds)
        row["faults"] += strays
        training = sum(record.training_seconds for record in records)
        row["clock"] = {**(stopwatch or {}), "training": training}
        lines = [record.line(plan.round) for record in records]
        if everybody:
            measured = {"round": plan.round, "measured": row, "clients": lines}
            append_lines(self.folder / PRIVATE, [measured], OWNER)
            row, lines = self._planned(federation, state, everybody, figures)
        self.rows.append(row)
        append_lines(self.folder / "clients.jsonl", lines)
        append_lines(self.folder / "rounds.jsonl", [row])
        if plan.round == self.federation.config.rounds:
            from d2ft_fl.report.plan_figure import draw_plan

            draw_plan(everybody or plan, self.folder / "plan.png")
        return row

    @staticmethod
    def _planned(
        federation: Federation, state: State, plan: Plan, figures: Mapping[str, float] | None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return a round's line and its clients' lines, of what all of them were to do."""
        privacy = federation.components.privacy
        assert privacy is not None
        records = Outcomes.planned(plan, federation.arch.rank)
        row = planned_line(federation, state, plan, records, figures, privacy.rate)
        unknown = {"wall_seconds": None, "training_seconds": None}
        return row, [record.line(plan.round) | unknown for record in records]

    @property
    def seconds(self) -> float:
        """How long the rounds took that are recorded."""
        measured = [line["measured"] for line in read_lines(self.folder / PRIVATE)]
        return float(sum(row["wall_seconds"] or 0.0 for row in measured or self.rows))

    @_writes
    def finish(self, weights: Mapping[str, Tensor], wall_seconds: float) -> dict[str, Any]:
        """Write the final model; returns the summary, for :func:`write_summary`."""
        self.adapter.export(self.folder, weights)
        return summarise(self.rows, self.federation, self.folder, wall_seconds)


def write_summary(folder: Path, summary: Mapping[str, Any], report: bool = True) -> None:
    """Write the totals and the page, and mark the run as finished: the last thing that a run does.

    Args:
        folder: The run folder.
        summary: The totals.
        report: Whether to write the page; a sweep has one page for all its runs.
    """
    with writing(folder):
        folder.joinpath("summary.json").write_text(write_json(summary, indent=2) + "\n")
        if report:
            _write_report(folder)
        write_status(folder, "finished")


def _write_report(folder: Path) -> None:
    """Write the page. An error is logged only: the results of the run are already written."""
    from d2ft_fl.report.pages import run_page

    try:
        run_page(folder)
    except Exception as error:
        log.warning("report.html was not written: %s: %s", type(error).__name__, error)
