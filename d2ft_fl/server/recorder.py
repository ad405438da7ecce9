"""The run folder: what a run leaves behind. JSON, safetensors and pictures; nothing pickled.

config.toml              the resolved configuration
rounds.jsonl             one line a round
clients.jsonl            one line a client and round
reports.jsonl            what clients said before each round, where that varies
checkpoints/             what the run needs to go on, see :mod:`d2ft_fl.server.checkpoint`
plans/round-001.safetensors   int8 schedules [clients, slots, blocks, heads]; where clients train
                         LoRA at different ranks, int64 ranks [clients, blocks, heads]
plan.png                 the last round's plan
model.safetensors, model.json   the final model, a timm state dict and how to build it
summary.json             totals, and the comparison with full fine-tuning
status.json              running, finished or failed, and why
versions.json            versions of packages, the machine, the commit of the code
report.html              the run's page, see :mod:`d2ft_fl.report`; not of a sweep's trial
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.budgets.budget import UNLIMITED, Budget
from d2ft_fl.costs.resources import RESOURCES, workload_variance
from d2ft_fl.engine.model_adapter import ModelAdapter
from d2ft_fl.errors import RunError
from d2ft_fl.planning.importance import subnet_scores
from d2ft_fl.planning.utility import Utility
from d2ft_fl.records.client_record import ClientRecord
from d2ft_fl.records.run_folder import read_lines, read_rows, write_status, write_whole
from d2ft_fl.records.summary import summarise
from d2ft_fl.records.versions import versions
from d2ft_fl.rounds.federation import Federation, Report, State
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.util.toml import dump_toml

log = logging.getLogger(__name__)
LINES = ("rounds.jsonl", "clients.jsonl", "reports.jsonl")


@dataclass
class Recorder:
    """Writes one run's folder as the run goes on.

    Attributes:
        rows: The rounds' lines so far.
    """

    folder: Path
    federation: Federation
    adapter: ModelAdapter
    rows: list[dict[str, Any]] = field(default_factory=list)
    _said: dict[int, list[Any]] = field(default_factory=dict)

    def start(self) -> None:
        """Make the folder, write the configuration and with what the run is made."""
        self._describe()
        for name in ("rounds.jsonl", "clients.jsonl"):
            self.folder.joinpath(name).write_text("")
        write_status(self.folder, "running")

    def resume(self, rounds: int) -> None:
        """Take up the record of a run where it was after so many rounds.

        Raises:
            RunError: When it is shorter than that.
        """
        self._describe()
        self.rows = [row for row in read_rows(self.folder) if row["round"] <= rounds]
        if len(self.rows) != rounds:
            raise RunError(
                f"rounds.jsonl has {len(self.rows)} whole lines, the checkpoint is of round "
                f"{rounds}: the run in {str(self.folder)!r} cannot be resumed"
            )
        for name in LINES:
            path = self.folder / name
            if not path.exists() or name == "reports.jsonl":  # what was asked is not asked again
                continue
            kept = [line for line in read_lines(path) if line["round"] <= rounds]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        for line in read_lines(self.folder / "reports.jsonl"):
            if line["round"] > rounds and line["reports"]:  # where nobody answered, all are asked
                self._said.setdefault(line["round"], []).append(line["reports"])
        self.folder.joinpath("summary.json").unlink(missing_ok=True)
        write_status(self.folder, "running")

    def _describe(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.joinpath("plans").mkdir(exist_ok=True)
        entries = self.federation.config.to_mapping() | {"run-folder": str(self.folder)}
        write_whole(self.folder / "config.toml", dump_toml(entries | {"resume": ""}))
        made_with = versions(self.federation.config.device)
        self.folder.joinpath("versions.json").write_text(json.dumps(made_with, indent=2) + "\n")

    def reports(self, round_number: int, reports: Sequence[Report]) -> None:
        """Keep what clients said before a round, where they say another thing in each."""
        said = [[r.client, r.examples, r.budget.to_json()] for r in reports]
        self._append("reports.jsonl", [{"round": round_number, "reports": said}])

    def next_reports(self, round_number: int) -> list[Report] | None:
        """What clients said when a round was begun before this run was resumed: at its first
        attempt, then at its second; None where they are to be asked.
        """
        attempts = self._said.get(round_number)
        if not attempts:
            return None
        return [Report(c, n, Budget.from_mapping(b)) for c, n, b in attempts.pop(0)]

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a file, so that they survive a power cut."""
        with self.folder.joinpath(name).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def plan(self, plan: Plan) -> None:
        """Keep a round's schedules."""
        path = self.folder / "plans" / f"round-{plan.round:03d}.safetensors"
        tensors = {
            "schedules": torch.from_numpy(plan.schedules()),
            "clients": torch.tensor([c.client for c in plan.clients]),
        }
        ranks = plan.ranks(self.federation.at(plan.round).arch.rank)
        if ranks is not None:
            tensors["ranks"] = torch.from_numpy(ranks)
        safetensors.torch.save_file(tensors, path)

    def round(
        self,
        federation: Federation,
        state: State,
        plan: Plan,
        records: list[ClientRecord],
        accuracy: float | None,
        loss: float | None,
        wall_seconds: float,
        strays: Sequence[str] = (),
        stopwatch: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Append a round; returns its line.

        Args:
            accuracy, loss: None where the round's model was not evaluated.
            strays: Faults of those who had nothing to do.
            clock: Seconds of the round by what the server did in them.
        """
        row = self._row(federation, state, plan, records, accuracy, loss, wall_seconds)
        row["faults"] += strays
        training = sum(record.training_seconds for record in records)
        row["clock"] = {**(stopwatch or {}), "training": training}
        self.rows.append(row)
        self._append("clients.jsonl", (_client_row(plan.round, record) for record in records))
        self._append("rounds.jsonl", [row])
        if plan.round == self.federation.config.rounds:
            from d2ft_fl.report.plan_figure import draw_plan

            draw_plan(plan, self.folder / "plan.png")
        return row

    def _row(
        self,
        federation: Federation,
        state: State,
        plan: Plan,
        records: list[ClientRecord],
        accuracy: float | None,
        loss: float | None,
        wall_seconds: float,
    ) -> dict[str, Any]:
        worked = [r for r in records if r.used is not None]
        losses = [(r.train_loss, r.examples) for r in worked if r.train_loss is not None]
        trained, last = plan.trained, state.last_trained
        full = {c.client: federation.costs.full_cost(c.local) for c in plan.clients}
        row: dict[str, Any] = {
            "round": state.round,
            "accuracy": accuracy,
            "loss": loss,
            "train_loss": sum(x * n for x, n in losses) / max(1, sum(n for _, n in losses)),
        }
        for index, resource in enumerate(RESOURCES):
            of_worked = [getattr(full[r.client], resource) for r in worked]
            row[resource] = _resource(index, resource, worked) | {
                "allowed_share": _allowed_share(index, worked, of_worked),
                "full_mean": float(np.mean(of_worked)) if worked else 0.0,
                "full_total": sum(getattr(c, resource) for c in full.values()),
            }
        row |= {
            "coverage": float((trained > 0).mean()),
            "covered_so_far": float((last > 0).mean()),
            "longest_untrained": int((state.round - last).max()),
            "workload_variance": workload_variance([r.used.flops for r in worked if r.used]),
            "clients_per_subnet": float(trained.mean()),
            "trained": trained.tolist(),
            "round_seconds": max((r.seconds for r in records), default=0.0),
            "wall_seconds": wall_seconds,
            "plan_seconds": plan.seconds,
            "worth": _utility(federation, state, plan),
            "clients": len(records),
            "worked": len(worked),
            "sat_out": sum(r.sat_out for r in records),
            "scored": sum(r.scored > 0 for r in worked),
            "faults": [f"client {r.client}: {r.failure}" for r in records if r.failure],
            "violations": _violations(worked),
            "flops_as_predicted": sum(r.predicted.flops == r.used.flops for r in worked if r.used),
            **state.figures,
        }
        return row

    def finish(self, weights: Mapping[str, Tensor], wall_seconds: float) -> dict[str, Any]:
        """Write the model; returns the summary, for :func:`write_summary`."""
        self.adapter.export(self.folder, weights)
        return summarise(self.rows, self.federation, self.folder, wall_seconds)


def write_summary(folder: Path, summary: Mapping[str, Any], report: bool = True) -> None:
    """Write the totals, the page and that the run is finished: the last thing a run does.

    Args:
        report: Whether to write the page; a sweep has one for all its runs.
    """
    folder.joinpath("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if report:
        _write_report(folder)
    write_status(folder, "finished")


def _write_report(folder: Path) -> None:
    """The page; what goes wrong with it is said, and costs nothing of the run's result."""
    from d2ft_fl import report

    try:
        report.run_page(folder)
    except Exception as error:
        log.warning("report.html was not written: %s: %s", type(error).__name__, error)


def _utility(federation: Federation, state: State, plan: Plan) -> float:
    """What the round was worth, by what is known of its subnets."""
    known = subnet_scores("fisher", federation.own or federation.arch, {}, state.scores)
    config = federation.config
    return plan.utility(Utility(known, known), config.upload_bits, config.download_bits)


def _resource(index: int, name: str, worked: list[ClientRecord]) -> dict[str, Any]:
    """Means over the clients that worked, and the worst share of its allowance."""
    used = [getattr(r.used, name) for r in worked]
    limited = [
        (u, int(r.allowed[index]))
        for u, r in zip(used, worked, strict=True)
        if r.allowed[index] < UNLIMITED
    ]
    return {
        "used_mean": float(np.mean(used)) if used else 0.0,
        "allowed_mean": float(np.mean([a for _, a in limited])) if limited else None,
        "worst": max((u / max(1, a) for u, a in limited), default=None),
    }


def _allowed_share(index: int, worked: list[ClientRecord], full: list[int]) -> float | None:
    """What budgets allow of full fine-tuning's use, capped at all of it; None without a budget."""
    if all(r.allowed[index] >= UNLIMITED for r in worked):
        return None
    allowed = sum(min(int(r.allowed[index]), f) for r, f in zip(worked, full, strict=True))
    return allowed / max(1, sum(full))


def _violations(worked: list[ClientRecord]) -> list[str]:
    """Every budget that measurement found broken, named."""
    out = []
    for r in worked:
        assert r.used is not None
        for name, used, allowed in zip(RESOURCES, r.used.vector(), r.allowed, strict=True):
            if used > allowed:
                out.append(f"client {r.client}: {name} {used} of {allowed}")
        if r.deadline is not None and r.seconds > r.deadline:
            out.append(f"client {r.client}: {r.seconds:.3g} s of {r.deadline:.3g} s")
    return out


def _client_row(round_number: int, r: ClientRecord) -> dict[str, Any]:
    allowed = {
        name: int(a) if a < UNLIMITED else None
        for name, a in zip(RESOURCES, r.allowed, strict=True)
    }
    return {
        "round": round_number,
        "client": r.client,
        "device": r.device,
        "examples": r.examples,
        "operations": r.operations,
        "way": asdict(r.policy),
        "used": asdict(r.used) if r.used else None,
        "predicted": asdict(r.predicted),
        "allowed": allowed,
        "seconds": r.seconds,
        "deadline": r.deadline,
        "wall_seconds": r.wall_seconds,
        "train_loss": r.train_loss,
        "scored": r.scored,
        "viewed": r.viewed,
        "gap": r.gap,
        "rank": r.rank,
        "sat_out": r.sat_out,
        "fault": r.failure,
    }
