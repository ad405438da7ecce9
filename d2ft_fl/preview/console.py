"""A preview in a terminal: tables, and a map of who trains what."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.preview.plan_preview import DEADLINE, LIMITS, ClientPreview, Preview, RoundPreview
from d2ft_fl.report.format import LIMIT_LABELS, OPERATIONS, policy_words, quantity, seconds, unit_of
from d2ft_fl.util import terminal

MOST_CLIENTS = 20  # in a table; of more, device classes and the first few are shown
FIRST_CLIENTS = 5
WIDE = 116  # columns of a terminal in which amounts fit beside shares
COLUMNS = "subnets by operation; used share of each budget"
ROUNDS = "Used beside all clients training everything, and what is trained"
OUTCOME = ("time", "bound by", "gap")
WHITE, BLUE, ALARM = (247, 251, 255), (0, 114, 178), (213, 94, 0)  # Okabe & Ito


def show(found: Preview, console: Console | None = None) -> None:
    """Print a preview: its rounds, the clients of the last one, and the maps."""
    console = console or terminal.console
    last = found.rounds[-1]
    if len(found.rounds) > 1:
        _print(console, ROUNDS, _rounds(found))
    title = f"Round {last.round}: {COLUMNS}"
    clients = last.clients
    if len(clients) > MOST_CLIENTS:
        _print(console, title + "; by device class", _classes(last))
        clients = clients[:FIRST_CLIENTS]
        title = f"The first {len(clients)} clients"
    _print(console, title, _clients(clients, console.width))
    for line in totals(found, last):
        console.print(line, markup=False)
    console.print()
    title = f"clients of {len(last.clients)} that train each subnet in round {last.round}"
    console.print(heat_map(last.trained, len(last.clients), title, console.width))
    if len(found.rounds) > 1:
        title = f"rounds of {len(found.rounds)} in which somebody trains each subnet"
        console.print(heat_map(found.covered_over_rounds, len(found.rounds), title, console.width))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def _print(console: Console, title: str, table: Table) -> None:
    """Print a table under a title, which Rich would fold to the width of the table."""
    console.print(title, style="bold", markup=False)
    console.print(table, "", sep="\n")


def totals(found: Preview, r: RoundPreview) -> list[str]:
    """Print what a round comes to, in a few lines."""
    out = len(r.clients) - len(r.working)
    shares = ", ".join(f"{LIMIT_LABELS[name]} {r.share_of_full(name):.0%}" for name in RESOURCES)
    lines = [
        f"round {r.round}: {len(r.clients)} clients, {out} sit out; used beside training "
        f"everything: {shares}",
        f"{r.coverage:.0%} of {found.subnets} subnets trained, {r.short_subnets} by nobody; "
        f"workload variance {r.workload_variance:.3f}; slowest client "
        f"{seconds(r.round_seconds)} simulated",
    ]
    gaps = "no bound on what is better"
    if r.gaps:
        gaps = f"gap to the best at most {np.mean(r.gaps):.2%}, worst client {max(r.gaps):.2%}"
    lines.append(f"{gaps}; planned in {sum(x.plan_seconds for x in found.rounds):.2g} s")
    return lines


def heat_map(counts: np.ndarray, most: int, title: str, width: int) -> Text:
    """Blocks down, heads across: int64 [blocks, heads] of at most ``most``, each in its colour.

    Where numbers do not fit into ``width`` columns they are percentages.
    """
    blocks, heads = counts.shape
    margin = len(str(blocks - 1)) + 1
    cell = max(len(str(counts.max())), len(str(heads - 1)), 2) + 1
    if margin + cell * heads > width and cell > 4:
        counts, most, cell = np.rint(100 * counts / max(1, most)).astype(np.int64), 100, 4
        title += ", in %"
    text = Text(title + " (blocks down, heads across)\n")
    text.append(" " * margin + "".join(f"{head:>{cell}}" for head in range(heads)), "bold")
    for block in range(blocks):
        text.append(f"\n{block:>{margin - 1}} ", "bold")
        for count in counts[block].tolist():
            text.append(f"{count:>{cell}}", _style(count / max(1, most)))
    return text.append("\n")


def _style(share: float) -> Style:
    """Deeper blue for a larger share; another colour for none."""
    mixed = [round(w + (b - w) * min(1.0, share)) for w, b in zip(WHITE, BLUE, strict=True)]
    red, green, blue = mixed if share else ALARM
    ink = "#ffffff" if share > 0.6 or not share else "#000000"
    return Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}", bold=not share)


def _table(heads: Iterable[str], left: int = 1) -> Table:
    """Return a table whose first ``left`` columns are words."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    for index, head in enumerate(heads):
        words = index < left
        table.add_column(head, justify="left" if words else "right", no_wrap=not words)
    return table


def shown_limits(clients: list[ClientPreview]) -> list[str]:
    """Of ``LIMITS``, those that a table of these clients shows."""
    return [n for n in LIMITS if n in RESOURCES or any(n in c.shares for c in clients)]


def shown_operations(clients: list[ClientPreview]) -> list[str]:
    """Of ``OPERATIONS``, those that a table of these clients shows."""
    return [op for op in OPERATIONS if op != "frozen" or any(c.operations[op] for c in clients)]


def has_ranks(clients: list[ClientPreview]) -> bool:
    """Whether any of these clients chooses among ranks."""
    return any(c.rank is not None for c in clients)


def rank(c: ClientPreview) -> str:
    """Return a cell of the mean rank at which a client trains."""
    return "-" if c.rank is None else f"{c.rank:.3g}"


def outcome(c: ClientPreview) -> list[str]:
    """Cells of how long a client takes, what binds it, and how good its plan is."""
    return [
        "sits out" if c.sits_out else seconds(c.seconds),
        LIMIT_LABELS.get(c.binding, c.binding),
        "-" if c.gap is None else f"{c.gap:.2%}",
    ]


def used(c: ClientPreview, name: str, wide: bool = True) -> tuple[str, str]:
    """Return what a client uses of a budget: an amount, if it fits, and a share, if limited."""
    amount = wide and name != DEADLINE
    return (
        quantity(getattr(c.cost, name), unit_of(name)) if amount else "",
        f"{c.shares[name]:.0%}" if name in c.shares else "",
    )


def policy(c: ClientPreview) -> str:
    """How a client runs its schedule, where that is not as it is configured, in few words."""
    if c.sits_out:
        return ""
    share = f"{c.examples / max(1, c.local):.0%} data" * (c.examples < c.local)
    return ", ".join(filter(None, [share, policy_words(asdict(c.policy))]))


def _clients(clients: list[ClientPreview], width: int) -> Table:
    operations, limits = shown_operations(clients), shown_limits(clients)
    ranks = has_ranks(clients)
    heads = ["client", "device", *(OPERATIONS[op] for op in operations), *["rank"] * ranks]
    policies = ["policy"] * any(policy(c) for c in clients)
    table = _table([*heads, *(LIMIT_LABELS[n] for n in limits), *OUTCOME, *policies], 2)
    if policies:
        table.columns[-1].no_wrap = False  # the longest gives way, before names are cut

    longest = max(len(policy(c)) for c in clients) + 1

    def cell(c: ClientPreview, name: str) -> str:
        amount, share = used(c, name, wide=width >= WIDE + (longest if policies else 0))
        return f"{amount} {share or '-':>4}" if amount else share or "-"

    for c in clients:
        table.add_row(
            str(c.client),
            escape(c.device),
            *(f"{c.operations[op]:.4g}" for op in operations),
            *[rank(c)] * ranks,
            *(cell(c, name) for name in limits),
            *outcome(c),
            *([policy(c)] if policies else []),
        )
    return table


def _classes(r: RoundPreview) -> Table:
    operations, limits = shown_operations(r.clients), shown_limits(r.clients)
    ranks = has_ranks(r.clients)
    heads = ["device", "clients", "", *(OPERATIONS[op] for op in operations), *["rank"] * ranks]
    heads += [*(LIMIT_LABELS[n] for n in limits), "time", "sit out", "bound by"]
    table = _table(heads)
    statistics: dict[str, Callable[[list[float]], float]] = {
        "mean": lambda x: float(np.mean(x)), "min": min, "max": max,
    }  # fmt: skip
    for device, clients in r.classes().items():
        bound = Counter(c.binding for c in clients).most_common(1)[0][0]
        for name, statistic in statistics.items():
            first = name == "mean"
            table.add_row(
                escape(device) if first else "",
                str(len(clients)) if first else "",
                name,
                *(f"{statistic([c.operations[op] for c in clients]):.4g}" for op in operations),
                *[_rank(statistic, clients)] * ranks,
                *(_share(statistic, clients, limit) for limit in limits),
                seconds(statistic([c.seconds for c in clients])),
                str(sum(c.sits_out for c in clients)) if first else "",
                LIMIT_LABELS.get(bound, bound) if first else "",
                end_section=name == "max",
            )
    return table


def _rank(statistic: Callable[[list[float]], float], clients: list[ClientPreview]) -> str:
    found = [c.rank for c in clients if c.rank is not None]
    return f"{statistic(found):.3g}" if found else "-"


def _share(
    statistic: Callable[[list[float]], float], clients: list[ClientPreview], limit: str
) -> str:
    shares = [c.shares[limit] for c in clients if limit in c.shares]
    return f"{statistic(shares):.0%}" if shares else "-"


def rounds(found: Preview) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of rounds."""
    heads = ["round", "sit out", *(LIMIT_LABELS[name] for name in RESOURCES)]
    rows = [
        [
            str(r.round),
            str(len(r.clients) - len(r.working)),
            *(f"{r.share_of_full(name):.0%}" for name in RESOURCES),
            f"{r.coverage:.0%}",
            str(r.short_subnets),
            f"{r.workload_variance:.3f}",
            seconds(r.round_seconds),
            f"{max(r.gaps):.2%}" if r.gaps else "-",
        ]
        for r in found.rounds
    ]
    return [*heads, "covered", "by nobody", "variance", "time", "worst gap"], rows


def _rounds(found: Preview) -> Table:
    heads, rows = rounds(found)
    table = _table(heads, 0)
    for row in rows:
        table.add_row(*row)
    return table
