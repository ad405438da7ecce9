"""Pictures of plans, and where pictures may be written."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from d2ft_fl.errors import ConfigError
from d2ft_fl.rounds.plan import Plan
from d2ft_fl.subnets.schedule import Operation

COLOURS = {  # colour-blind safe (Okabe & Ito)
    Operation.SHORTCUT: np.array([0.93, 0.93, 0.93]),
    Operation.FORWARD_ONLY: np.array([0.90, 0.62, 0.00]),
    Operation.FROZEN: np.array([0.34, 0.71, 0.91]),
    Operation.FULL: np.array([0.00, 0.45, 0.70]),
}
LABELS = {
    Operation.FULL: "FULL: forward and backward",
    Operation.FROZEN: "FROZEN: gradient passes",
    Operation.FORWARD_ONLY: "FORWARD_ONLY: no gradient",
    Operation.SHORTCUT: "SHORTCUT: skipped",
}
MOST_CLIENTS, DPI = 24, 110


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Check that a file with one of some suffixes can be written.

    Raises:
        ConfigError: When the suffix is another one, or there is no such folder.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"--output {str(path)!r} must end in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {str(path)!r}: there is no folder {str(path.parent)!r}")


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw the plan of a round as a PNG: a row for each client, a column for each subnet.

    With several slots a cell mixes the colours of what the subnet does in them.
    """
    schedules = plan.schedules()[:MOST_CLIENTS]  # [clients, slots, blocks, heads]
    clients, _, blocks, heads = schedules.shape
    shares = [(schedules == op).mean(axis=1)[..., None] * c for op, c in COLOURS.items()]
    colours = np.sum(shares, axis=0).reshape(clients, blocks * heads, 3)

    size = max(6.0, 0.24 * blocks * heads + 2.4), 0.24 * clients + 2.0
    figure = Figure(size, dpi=DPI)  # of another than it is saved at there would be pixels twice
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = [np.arange(count + 1) - 0.5 for count in (blocks * heads, clients)]
    # An image would be blown up to the picture's pixels, at 64 bytes each.
    axes.pcolormesh(*edges, colours, edgecolors="white", linewidth=0.8)
    axes.invert_yaxis()
    for block in range(1, blocks):
        axes.axvline(block * heads - 0.5, color="black", linewidth=1.2)
    axes.set_xticks([b * heads + (heads - 1) / 2 for b in range(blocks)])
    axes.set_xticklabels([f"block {b}" for b in range(blocks)])
    axes.set_yticks(range(clients))
    axes.set_yticklabels(
        [
            f"client {c.client}" + (f", {c.budget.device}" if c.budget.device else "")
            for c in plan.clients[:MOST_CLIENTS]
        ]
    )
    axes.set_title(f"Round {plan.round}: who runs which of {heads} heads a block", fontsize=11)
    handles = [
        Patch(facecolor=tuple(COLOURS[op]), label=text)
        for op, text in LABELS.items()
        if op is not Operation.FROZEN or (schedules == op).any()
    ]
    columns = len(handles) if size[0] >= 2.6 * len(handles) else 2
    below = 0.2 + 0.2 * -(-len(handles) // columns)  # inches
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, below / size[1], 1, 1))
    figure.savefig(path, dpi="figure")
