"""Folders of runs and sweeps with numbers made up, so that tests know them by hand."""

import json

import numpy as np
import safetensors.numpy

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.subnets.schedule import Operation
from d2ft_fl.util.toml import dump_toml
from tests.tasks.made_up import DISTANCE

RESOURCES = ("flops", "memory", "bytes_up", "bytes_down")
FULL = {"flops": 1000, "memory": 500, "bytes_up": 100, "bytes_down": 200}  # of every client
ALLOWED = {"flops": 600, "memory": 400, "bytes_up": 50, "bytes_down": None}
USED = {"flops": 300, "memory": 200, "bytes_up": 40, "bytes_down": 150}
DEVICES = ("phone", "laptop")


def client_row(round_number, client, used=None, allowed=None, **changes):
    """A line of clients.jsonl; clients take the devices in turn."""
    return {
        "round": round_number,
        "client": client,
        "device": DEVICES[client % len(DEVICES)],
        "examples": 10,
        "operations": {"shortcut": 0.25, "forward_only": 0.25, "frozen": 0.0, "full": 0.5},
        "used": USED if used is None else used,
        "predicted": USED,
        "allowed": ALLOWED if allowed is None else allowed,
        "seconds": 2.0,
        "deadline": None,
        "wall_seconds": 0.1,
        "train_loss": 1.5,
        "scored": 0,
        "gap": 0.01,
        "rank": None,
        "sat_out": False,
        "fault": None,
    } | changes


def sits_out(round_number, client):
    """A line of a client that did nothing."""
    nothing = {"shortcut": 1.0, "forward_only": 0.0, "frozen": 0.0, "full": 0.0}
    return client_row(round_number, client, sat_out=True, operations=nothing, seconds=0.0) | {
        "used": None,
        "train_loss": None,
    }


def round_row(round_number, accuracy, rows, **changes):
    """A line of rounds.jsonl that sums up lines of its clients."""
    worked = [row for row in rows if row["used"]]
    out = {"round": round_number, "accuracy": accuracy, "loss": 1 - accuracy, "train_loss": 1.5}
    for name in RESOURCES:
        used = [row["used"][name] for row in worked]
        limited = [row for row in worked if row["allowed"][name] is not None]
        out[name] = {
            "used_mean": sum(used) / len(used) if used else 0.0,
            "allowed_mean": None,
            "worst": max((r["used"][name] / r["allowed"][name] for r in limited), default=None),
            "allowed_share": limited[0]["allowed"][name] / FULL[name] if limited else None,
            "full_mean": float(FULL[name]) if worked else 0.0,
            "full_total": FULL[name] * len(rows),
        }
    return out | {
        "coverage": 0.75, "covered_so_far": 1.0, "longest_untrained": 0, "workload_variance": 0.1,
        "clients_per_subnet": 1.0, "trained": [[1]], "round_seconds": 2.0, "wall_seconds": 0.5,
        "plan_seconds": 0.1, "clients": len(rows), "worked": len(worked),
        "sat_out": sum(row["sat_out"] for row in rows),
        "faults": [f"client {r['client']}: {r['fault']}" for r in rows if r["fault"]],
        "violations": [], "flops_as_predicted": len(worked),
    } | changes  # fmt: skip


def plan_of(clients, slots=1, blocks=2, heads=3, seed=0):
    """Random schedules: int8 [clients, slots, blocks, heads]."""
    shape = (clients, slots, blocks, heads)
    return np.random.default_rng(seed).choice(len(Operation), size=shape).astype(np.int8)


def write_run(folder, rounds, plans=None, config=None, status="finished", reason="", ranks=None):
    """A run's folder.

    Args:
        rounds: Of each round its line, and the lines of its clients.
        plans: Of each round its schedules; random ones.
        ranks: Of each round its ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("plans").mkdir(exist_ok=True)
    options = RunConfig(rounds=len(rounds), clients=len(rounds[0][1])).to_mapping()
    folder.joinpath("config.toml").write_text(dump_toml(options | (config or {})))
    folder.joinpath("status.json").write_text(json.dumps({"status": status, "reason": reason}))
    lines = [json.dumps(line) + "\n" for line, _ in rounds]
    folder.joinpath("rounds.jsonl").write_text("".join(lines))
    lines = [json.dumps(row) + "\n" for _, rows in rounds for row in rows]
    folder.joinpath("clients.jsonl").write_text("".join(lines))
    for index, (line, rows) in enumerate(rounds):
        schedules = plans[index] if plans else plan_of(len(rows), seed=index)
        tensors = {"schedules": schedules, "clients": np.arange(len(rows))}
        if ranks:
            tensors["ranks"] = ranks[index]
        name = f"round-{line['round']:03d}.safetensors"
        safetensors.numpy.save_file(tensors, folder / "plans" / name)
    if status == "finished":
        summary = {"strategy": "d2ft", "keeps_budgets": True, "wall_seconds": 1.0}
        folder.joinpath("summary.json").write_text(json.dumps(summary))
    return folder


def distance_run(folder, distances, **more):
    """A run of the made-up task whose primary metric is minimised, with these distances."""
    rows = [client_row(1, client) for client in range(2)]
    rounds = []
    for number, distance in enumerate(distances, 1):
        line = round_row(number, 0.0, rows)
        del line["accuracy"], line["loss"]
        line |= DISTANCE.entries({"distance": distance, "within": 1 / (1 + distance)})
        rounds.append((line, [row | {"round": number} for row in rows]))
    return write_run(folder, rounds, **more)


def simple_run(folder, accuracies=(0.5, 0.75), clients=2, **more):
    """A run whose clients all do the same, with these accuracies, in the format of old runs."""
    rounds = []
    for number, accuracy in enumerate(accuracies, 1):
        rows = [client_row(number, client) for client in range(clients)]
        rounds.append((round_row(number, accuracy, rows), rows))
    return write_run(folder, rounds, **more)


def write_sweep(folder, trials, run=simple_run):
    """A sweep's folder.

    Args:
        trials: Of each its settings, final primary metric (None: no run), other entries.
        run: Writes a run's folder with the primary metrics of its rounds.
    """
    entries = []
    for number, (settings, metric, *changes) in enumerate(trials):
        name = f"trial-{number}"
        if metric is not None:
            run(folder / "trials" / name, (metric / 2, metric), config=settings)
        entry = {"trial": name, "settings": settings, "status": "finished", "reason": ""}
        entries.append(entry | (changes[0] if changes else {}))
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("trials.json").write_text(json.dumps(entries))
    return folder
