"""Options of budgets, of the planner and of the scores that it weighs."""

from dataclasses import dataclass

from d2ft_fl.config.choices import COUPLINGS, MATCHED_BUDGETS, PLANNERS, SCORES
from d2ft_fl.config.option import option


@dataclass(frozen=True)
class BudgetOptions:
    """Budgets."""

    budgets: str = option(
        "devices",
        "Where clients get their budgets: the built-in classes devices or hardware, measured, a "
        "TOML file of device classes, or module:callable.",
    )
    match: str = option(
        "",
        "The one budget that is kept, scaled to match-share, to compare strategies at equal cost; "
        "empty keeps all budgets as they are.",
        choices=("", *MATCHED_BUDGETS),
    )
    match_share: float = option(
        0.0,
        "Mean of the matched budget over clients, as a share of training everything; 0 keeps the "
        "mean that budgets have.",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class PlanningOptions:
    """Planning."""

    stage_rounds: int = option(
        0,
        "Rounds of a stage of strategies that train in stages (progfed, slt); 0 divides the run "
        "evenly.",
        low=0,
        unit="rounds",
    )
    planner: str = option(
        "joint",
        "How operations are planned: joint weighs all of them against each other, two-stage is as "
        "in the D2FT paper.",
        choices=PLANNERS,
    )
    policy_batch: bool = option(
        True,
        "Whether d2ft chooses batch sizes up to batch-size for clients that train on fewer "
        "examples; false by itself where batch-size is given.",
    )
    slots: int = option(1, "Parts of a batch, each with operations of its own.", low=1)
    backward_score: str = option("fisher", "Importance score of training a subnet.", choices=SCORES)
    forward_score: str = option("fisher", "Importance score of running a subnet.", choices=SCORES)
    forward_weight: float = option(
        1.0, "Utility of running a subnet beside that of training it, at equal scores.", low=0
    )
    frozen_weight: float = option(
        0.0,
        "Utility of letting the gradient through a subnet that does not train (FROZEN), beside "
        "that of training it; 0 does without this operation.",
        low=0,
    )
    coupling: str = option(
        "none",
        "How clients are planned together: none, spread (diminishing returns over clients), or "
        "agenda (every subnet is trained within agenda-rounds rounds).",
        choices=COUPLINGS,
    )
    spread_clients: float = option(
        0.1,
        "Share of clients at which one more that trains a subnet counts half of the first "
        "(coupling = spread).",
        above=0,
    )
    least_clients: int = option(
        1,
        "Clients that should train every subnet in a round (coupling = spread).",
        low=0,
        unit="clients",
    )
    agenda_rounds: int = option(
        4,
        "Rounds within which every subnet is trained (coupling = agenda).",
        low=1,
        unit="rounds",
    )
    exploration: float = option(
        1.0,
        "How far strategy d2ft draws from the best scores each round: 0 keeps to them, 1 weighs "
        "each by a draw between 0 and 2.",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class ScoreOptions:
    """Scores that clients measure."""

    score_every: int = option(
        5,
        "Rounds from one scoring of subnets, and measuring of means for compensation, to the next, "
        "charged to budgets; 0 for none.",
        low=0,
        unit="rounds",
    )
    score_examples: int = option(
        4,
        "Examples that a client scores subnets on (fisher, gradient, taylor).",
        low=0,
        unit="examples",
    )
    score_momentum: float = option(
        0.5,
        "Share of what earlier rounds measured in the running mean of scores.",
        low=0,
        below=1,
    )
