"""A run's page."""

import math

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.report import client_charts, run_charts, run_tables
from d2ft_fl.report.format import heading, metric_format, metric_label, seconds
from d2ft_fl.report.frame import (
    NAMES,
    cards,
    configuration,
    details,
    listed,
    page,
    section,
    sentence,
    versions,
)
from d2ft_fl.report.run_folder import RunFolder, limits_of
from d2ft_fl.report.run_tables import BY_CLASS, BY_CLIENT

PLANNED = (
    "With noise, all figures of clients on this page are those of the plans of all clients, drawn "
    "or not. What clients did (who took part, what it took, training losses, faults) is not hidden "
    "by noise, and is only in private.jsonl."
)


def run_html(run: RunFolder) -> list[str]:
    """Return the page of a run, or of what there is of it so far, in pieces.

    Raises:
        ConfigError: When its folder is damaged.
    """
    options = RunConfig().to_mapping() | run.config
    title = (
        f"{options['strategy']}: {options['clients']} clients of {options['model']} on "
        f"{options['dataset']}, seed {options['seed']}"
    )
    rounds = run_charts.shown_rounds(run)
    plans = [run.plan(r) for r in rounds]
    clients = run.clients
    failures = [f"round {line['round']}, {x}" for line in run.lines for x in line["faults"]]
    broken = [f"round {line['round']}, {x}" for line in run.lines for x in line["violations"]]
    body = [
        _stands(run, options["rounds"]),
        _headline(run),
        sentence(PLANNED, "note") if run.planned else "",
        section(_title(run), run_charts.progress(run).html(), _rounds(run)),
        section("Coverage", run_charts.coverage(rounds, plans).html()),
        section("Who trained what", client_charts.who_trained(clients, rounds, plans).html()),
        section("Use of budgets", _budgets(run, rounds)),
        section("Resources", run_tables.resources(run)),
        section("Clients", _clients(run)),
        section("Faults", listed(failures) if failures else ""),
        section("Budgets broken", _reference(run), listed(broken)) if broken else "",
        section("Configuration", configuration(run.config)),
        section("Made with", versions([run.versions])),
    ]
    return page(title, "".join(body))


def _stands(run: RunFolder, rounds: int) -> str:
    """Say how far a run came that did not come to its end."""
    if run.finished:
        return ""
    done = f"{len(run.lines)} of {rounds} rounds are finished; this is what there is of it."
    if run.status == "failed":
        return sentence(f"This run failed: {run.reason or 'no reason is known'}. {done}", "alert")
    return sentence(f"This run is not finished ({run.status}). {done}", "alert")


def _rounds(run: RunFolder) -> str:
    return details("All rounds", run_tables.rounds(run))


def _headline(run: RunFolder) -> str:
    t = run.totals
    figures = _primary(run)
    for name in RESOURCES:
        share = t["resources"][name]["share"]
        figures.append((NAMES[name], f"{share:.0%}", "of training everything"))
    times = sum(line["clients"] for line in run.lines)
    figures.append(("violations", f"{t['violations']:,}", "of budgets"))
    if t["faults"] is not None:
        figures.append(("faults", f"{t['faults']:,}", "of clients"))
    figures += [
        ("sat out", f"{t['sat_out']:,.10g}", f"of {times:,.10g} times"),
        ("subnets trained", f"{t['coverage']:.0%}", "by anyone so far"),
        ("simulated time", seconds(t["round_seconds"]), _wall(run)),
    ]
    if t["aggregation_error"] is not None:
        figures.append(("aggregation error", f"{t['aggregation_error']:.2g}", "mean over rounds"))
    if (left := t["too_few_trainers"]) is not None:
        figures.append(("slices left", f"{left:.0%}", "too few trained them to tell"))
    epsilon = run.rounds["epsilon"].iloc[-1]
    if not math.isnan(epsilon):
        figures.append(("epsilon", f"{epsilon:.3g}", f"delta {run.config['delta']:.1g}, to here"))
    return cards(figures)


def _title(run: RunFolder) -> str:
    return heading(metric_label(run.spec.primary))


def _primary(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the cards of the primary metric: its last value and its best."""
    spec, name = run.spec, metric_label(run.spec.primary)
    values = run.metrics[spec.primary].dropna()
    if not len(values):
        return [(name, "-", "not evaluated yet")]
    written = metric_format(spec, spec.primary)
    best = values.idxmax() if spec.maximise else values.idxmin()
    return [
        (label, written.text(values[place]), f"after round {run.rounds['round'][place]}")
        for label, place in ((name, values.index[-1]), (f"best {name}", best))
    ]


def _wall(run: RunFolder) -> str:
    rounds = run.rounds["wall_seconds"].sum(min_count=1)
    wall = run.summary.get("wall_seconds", rounds) if run.summary else rounds
    return "" if math.isnan(wall) else f"{seconds(wall)} here"


def _budgets(run: RunFolder, rounds: list[int]) -> str:
    if not limits_of(run.clients):
        return sentence("No client that worked has a budget.")
    bars = client_charts.budget_bars(run.clients).html()
    return _reference(run) + bars + client_charts.budget_map(run.clients, rounds).html()


def _reference(run: RunFolder) -> str:
    if not run.summary or run.summary.get("keeps_budgets", True):
        return ""
    name = run.summary.get("strategy", run.config["strategy"])
    return sentence(f"{name} is a reference and does not look at budgets.", "note")


def _clients(run: RunFolder) -> str:
    frame = run.clients
    text = sentence(
        "Over all rounds: what subnets do, FLOPs and bytes in total, memory as the mean peak; "
        "beside each, the mean used share of the budget.", "note",
    )  # fmt: skip
    if frame["policy"].any():
        text += sentence(
            "A policy is what was done most often beside fewer heads and examples: batches in "
            "micro-batches, activations computed again, numbers that travel in fewer bits.",
            "note",
        )  # fmt: skip
    each = run_tables.clients(frame, BY_CLIENT)
    classes = run_tables.clients(frame, BY_CLASS)
    if not client_charts.by_class(frame):
        return text + classes + each
    return text + classes + details(f"All {frame['client'].nunique():,} clients", each)
