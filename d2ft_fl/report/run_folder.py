"""A run's folder, read: what :mod:`d2ft_fl.server.recorder` wrote, as frames."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy
from safetensors import SafetensorError

from d2ft_fl.budgets.budget import DEADLINE, LIMITS
from d2ft_fl.config.renamed import renamed
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import ConfigError
from d2ft_fl.records.metrics import with_metrics
from d2ft_fl.records.run_folder import stands
from d2ft_fl.records.summary import is_planned, totals
from d2ft_fl.report.format import UNNAMED, policy_words
from d2ft_fl.report.reading import damaged, read_json, read_lines
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.tasks.metrics import MetricSpec
from d2ft_fl.util.toml import read_toml

ROUNDS, STATUS = "rounds.jsonl", "status.json"
SUMMED = ("flops", "bytes_up", "bytes_down")  # of RESOURCES, those that add up over rounds


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run left behind, or what there is of it so far.

    Attributes:
        config: Options, by the keys of ``config.toml``.
        folder: The run folder.
        status: starting, running, finished or failed.
        reason: Why the run failed.
        versions: As :func:`d2ft_fl.records.versions.versions` found them; empty when not recorded.
        summary: Of a finished run.
        lines: Lines of ``rounds.jsonl``, one at least.
    """

    folder: Path
    config: dict[str, Any]
    status: str
    reason: str
    versions: dict[str, Any]
    summary: dict[str, Any] | None
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunFolder":
        """Read a run's folder; the files of clients and plans only when they are asked for.

        Raises:
            ConfigError: When it is none, has no finished round, or is damaged.
        """
        run = cls.begun(folder)
        if run.lines:
            return run
        why = f": {run.reason}" if run.reason else ""
        raise ConfigError(
            f"the run in {str(folder)!r} has no finished round yet ({run.status}{why}); there is "
            "nothing to show"
        )

    @classmethod
    def begun(cls, folder: Path) -> "RunFolder":
        """Read a run's folder as :meth:`read` does, of a run that may have no finished round."""
        status = read_json(folder / STATUS, dict) or {}
        summary = read_json(folder / "summary.json", dict)
        path = folder / ROUNDS
        lines = [with_metrics(line) for line in read_lines(path)] if path.exists() else []
        run = cls(
            folder=folder,
            config=renamed(read_toml(folder / "config.toml"), quietly=True) if lines else {},
            status=_status(status, summary is not None),
            reason=str(status.get("reason", "")),
            versions=read_json(folder / "versions.json", dict) or {},
            summary=summary,
            lines=lines,
        )
        try:
            _ = run.rounds, run.metrics, run.totals if lines else None  # find damaged lines
        except (KeyError, TypeError) as error:
            raise damaged(folder / ROUNDS, f"lacks something a round has ({error})") from None
        return run

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.status == "finished"

    @property
    def planned(self) -> bool:
        """Whether its figures of clients are planned ones, as those of runs with noise are."""
        return is_planned(self.lines[-1])

    @property
    def reference(self) -> bool:
        """Whether its strategy looks at no budget, so that it breaks what it likes."""
        return self.summary is not None and not self.summary.get("keeps", True)

    @cached_property
    def totals(self) -> dict[str, Any]:
        """Over the finished rounds; see :func:`d2ft_fl.records.summary.totals`."""
        return totals(self.lines)

    @cached_property
    def spec(self) -> MetricSpec:
        """What the run's task is measured by."""
        return MetricSpec.from_entries(self.lines[-1])

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a round, one column a metric; NaN where the model was not evaluated."""
        return pd.DataFrame([line["metrics"] for line in self.lines], dtype=float)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row a round.

        Beside the scalars of ``rounds.jsonl``: ``<resource>_share``, the mean client's use of
        training everything; ``<resource>_allowed`` and ``<resource>_worst`` of its budget; ``cum_``
        with ``flops``, ``bytes_up``, ``bytes_down`` and ``seconds``, sums so far over all clients;
        how many ``faults`` and ``violations``; metrics under their names.
        """
        frame = pd.DataFrame([_round(line) for line in self.lines])
        for name in (*SUMMED, "seconds"):
            frame[f"cum_{name}"] = frame[f"sum_{name}"].cumsum() if len(frame) else []
        return frame

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row a client and finished round.

        Operations are shares of subnets, means over slots. ``<limit>_share`` is the used share of
        what the client's budget allows, of the resources and the deadline; NaN without a limit, or
        where the client did not work.

        Raises:
            ConfigError: When the file is damaged.
        """
        path = self.folder / "clients.jsonl"
        last = int(self.rounds["round"].iloc[-1])
        columns: dict[str, list[Any]] = {}
        try:
            for row in read_lines(path):
                if row["round"] <= last:
                    for key, value in _client(row).items():
                        columns.setdefault(key, []).append(value)
        except (KeyError, TypeError) as error:
            raise damaged(path, f"lacks something a client has ({error})") from None
        frame = pd.DataFrame(columns)
        if columns:  # a function of budgets may name another device in another round
            frame["device"] = frame.groupby("client")["device"].transform("first")
        missing = set(self.rounds["round"]) - set(frame["round"] if len(frame) else [])
        if missing:
            raise damaged(path, f"has no line of round {min(missing)}")
        return frame

    def plan(self, round_number: int) -> "PlanFile":
        """Read the schedules of a round.

        Raises:
            ConfigError: When its file is missing or damaged.
        """
        path = self.folder / "plans" / f"round-{round_number:03d}.safetensors"
        try:
            tensors = safetensors.numpy.load_file(path)
            return PlanFile(tensors["clients"], tensors["schedules"], tensors.get("ranks"))
        except (OSError, SafetensorError, KeyError) as error:
            raise damaged(path, f"cannot be read ({error})") from None


@dataclass(frozen=True, eq=False)
class PlanFile:
    """A round's schedules.

    Attributes:
        clients: int64 [clients].
        schedules: int8 [clients, slots, blocks, heads].
        ranks: int64 [clients, blocks, heads]; None where clients do not choose among ranks.
    """

    clients: np.ndarray
    schedules: np.ndarray
    ranks: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and heads."""
        return self.schedules.shape[2], self.schedules.shape[3]

    def counts(self, operation: Operation) -> np.ndarray:
        """Clients with a slot that does it: int64 [blocks, heads]."""
        return (self.schedules == operation).any(axis=1).sum(axis=0)

    @property
    def trained(self) -> np.ndarray:
        """Which subnets each client trains: bool [clients, blocks, heads]."""
        return (self.schedules == Operation.FULL).any(axis=1)

    def mean_ranks(self) -> np.ndarray:
        """Over the clients that train a subnet: float64 [blocks, heads], NaN where none does."""
        ranks = 0 if self.ranks is None else self.ranks
        total = np.where(self.trained, ranks, 0).sum(axis=0)
        count = self.trained.sum(axis=0)
        return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _status(entries: dict[str, Any], has_summary: bool) -> str:
    """How a run stands; it writes its page when it has a summary, just before it says so."""
    status = stands(entries) if entries.get("status") else "unknown"
    return "finished" if has_summary and status == "running" else status


def _round(line: dict[str, Any]) -> dict[str, Any]:
    out = {name: _number(value) for name, value in line["metrics"].items()}
    out |= {
        key: line[key]
        for key in (
            "round", "coverage", "covered_so_far", "worked", "clients", "sat_out",
        )
    }  # fmt: skip
    out |= {key: _number(line[key]) for key in ("train_loss", "wall_seconds")}
    if not line["worked"]:  # nobody trained, so there was no loss
        out["train_loss"] = np.nan
    for name in ("aggregation_error", "epsilon"):
        out[name] = _number(line.get(name))
    out |= {"faults": len(line["faults"]), "violations": len(line["violations"])}
    out["sum_seconds"] = line["round_seconds"]
    for name in RESOURCES:
        part = line[name]
        out[f"{name}_share"] = part["used_mean"] / part["full_mean"] if line["worked"] else 0.0
        out[f"{name}_allowed"] = _number(part["allowed_share"])
        out[f"{name}_worst"] = _number(part["worst"])
        if name in SUMMED:
            out[f"sum_{name}"] = part["used_mean"] * line["worked"]
    return out


def _client(row: dict[str, Any]) -> dict[str, Any]:
    used, allowed = row["used"], row["allowed"]
    out = {key: row[key] for key in ("round", "client", "examples", "seconds", "sat_out", "fault")}
    out["device"], out["worked"] = row["device"] or UNNAMED, used is not None
    out |= {key: _number(row[key]) for key in ("train_loss", "gap", "rank")}
    # Older folders do not have these.
    out |= {key: _number(row.get(key)) for key in ("training_seconds", "predicted_seconds")}
    for operation in Operation:
        out[operation.name] = row["operations"][operation.name.lower()]
    for name in RESOURCES:
        out[name] = used[name] if used else 0
        limited = used and allowed[name] is not None
        out[f"{name}_share"] = used[name] / max(1, allowed[name]) if limited else np.nan
    out["policy"] = policy_words(row.get("policy", row.get("way", {})))
    deadline = row.get("deadline")
    out[f"{DEADLINE}_share"] = row["seconds"] / deadline if used and deadline else np.nan
    return out


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def limits_of(clients: pd.DataFrame) -> list[str]:
    """Of the resources and the deadline, those that some client's budget limits."""
    return [name for name in LIMITS if clients[f"{name}_share"].notna().any()]
