"""Trials that cost nothing, and something in place of Ray that runs them."""

import json
from dataclasses import dataclass, field

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.sweep.remote import Outcome
from d2ft_fl.sweep.trials import Trial

TRIALS = [
    Trial(RunConfig(lr=lr, rounds=3, seed=seed), {"lr": lr, "seed": seed})
    for seed in (0, 1)
    for lr in (1e-3, 2e-3)
]


def row(round_number, accuracy):
    return {"round": round_number, "accuracy": accuracy, "loss": 1 - accuracy, "wall_seconds": 1.0}


def summary(config, accuracy):
    resource = {"used": 6e6, "full": 10e6, "share": 0.6, "worst": None}
    return {
        "strategy": config.strategy,
        "seed": config.seed,
        "rounds": config.rounds,
        "accuracy": accuracy,
        "wall_seconds": 2.0,
        "resources": dict.fromkeys(("flops", "memory", "bytes_up", "bytes_down"), resource),
        "folder": "/elsewhere",
    }


def accuracy_of(trial):
    """Made up: better with a larger lr."""
    return min(1.0, 100 * trial.config.lr)


@dataclass
class FakeEngine:
    """Runs trials at once in this process, in rounds of made-up accuracies.

    Attributes:
        bad: Outcomes of some trials, by lr.
        interrupt: Raised when this many trials have ended.
        ran: Ids, in the order of their starts.
    """

    bad: dict = field(default_factory=dict)
    interrupt: int | None = None
    ran: list = field(default_factory=list)

    def __call__(self, todo, ledger, scratch):
        for count, trial in enumerate(todo):
            for _ in events(trial, ledger, self.bad.get(trial.config.lr)):
                if count == self.interrupt:
                    raise KeyboardInterrupt
            self.ran.append(trial.id)


def events(trial, ledger, outcome=None):
    """What becomes of one trial, a step at a time."""
    ledger.started(trial.id)
    yield
    accuracy, text, sent = accuracy_of(trial), "", 0
    for number in range(1, trial.config.rounds):
        text += json.dumps(row(number, accuracy / 2)) + "\n"
        changes = {"rounds.jsonl": (sent, text[sent:].encode())}
        sent = len(text)
        ledger.progressed(trial.id, number, accuracy / 2, changes)
        yield
    if outcome is None:
        outcome = Outcome("finished", seconds=2.0)
        text += json.dumps(row(trial.config.rounds, accuracy)) + "\n"
        changes = {
            "rounds.jsonl": (sent, text[sent:].encode()),
            "summary.json": (0, json.dumps(summary(trial.config, accuracy)).encode()),
        }
        ledger.ended(trial.id, outcome, accuracy, changes)
    else:
        ledger.ended(trial.id, outcome)
    yield
