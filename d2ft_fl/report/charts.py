"""Charts of a page: a Plotly figure, what a reader can choose, and how colours follow the theme.

Choices are plain HTML inputs, for keyboards and screen readers; :mod:`d2ft_fl.report.script` hands
what an option holds to ``Plotly.update``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from d2ft_fl.report.html import ALARM, COLOURS

LINES = (*COLOURS, "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
MOST_LINES = len(LINES) * len(DASHES)
MARGIN = {"l": 8, "r": 12, "t": 12, "b": 8}
LIGHT, DARK = "light", "dark"
INK = {LIGHT: "#1b1f24", DARK: "#e6edf3"}
GRID = {LIGHT: "#d8dee4", DARK: "#2c343d"}
GREY = "#7d8590"  # beside series, seen in light and dark
PAPER = {LIGHT: "#ffffff", DARK: "#0f1419"}
SCALE = {LIGHT: ("#eaf3f9", "#0072B2"), DARK: ("#12202b", "#56B4E9")}  # of heat maps: none, all
# Colour axes of heat maps: from nothing to all; counts, of which none is the alarm; ranks; used
# shares of a budget up to 2, of which those over 1 are the alarm.
SHARES, COUNTS, RANKS, BUDGETS = "coloraxis", "coloraxis2", "coloraxis3", "coloraxis4"
DRAWN = {LIGHT: "#0072B2", DARK: "#56B4E9"}  # a single series


@dataclass(frozen=True)
class Option:
    """One thing to choose.

    Attributes:
        label: What it is called.
        data: Argument of ``Plotly.update``: by attribute, a value for each trace.
        layout: Argument of ``Plotly.update``.
        note: A sentence shown while it is chosen.
    """

    label: str
    data: dict[str, list[Any]] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the option as the script takes it."""
        return {"label": self.label, "data": self.data, "layout": self.layout, "note": self.note}


@dataclass(frozen=True)
class Choice:
    """A row of buttons, of which one is on; or a slider that plays.

    Attributes:
        label: What is chosen.
        options: What there is to choose.
        chosen: Number of the option that the figure is drawn with.
        slider: Whether it is a slider that plays, not a row of buttons.
    """

    label: str
    options: Sequence[Option]
    chosen: int = 0
    slider: bool = False


@dataclass(frozen=True)
class Entry:
    """An entry of a legend: a name with the traces that it switches."""

    name: str
    colour: str
    dash: str
    traces: Sequence[int]
    shown: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure of a page.

    Attributes:
        name: Name of its element: letters and hyphens.
        label: What it shows, for readers who cannot see it.
        figure: What Plotly draws.
        text: Caption, plain text.
        choices: What a reader can choose.
        legend: Which lines a reader can switch on and off.
        key: HTML that says what colours mean, such as :func:`scale_key`.
        most_width: Largest width in pixels; 0 takes all of the page.
    """

    name: str
    label: str
    figure: go.Figure
    text: str = ""
    choices: Sequence[Choice] = ()
    legend: Sequence[Entry] = ()
    key: str = ""
    most_width: int = 0

    def html(self) -> str:
        """Return the element of the chart."""
        drawn = self.figure.to_plotly_json()
        spec = {
            "data": drawn["data"],
            "layout": drawn["layout"],
            "choices": [[option.to_json() for option in c.options] for c in self.choices],
        }
        notes = [c.options[c.chosen].note for c in self.choices]
        inputs = "".join(self._choice(number, c) for number, c in enumerate(self.choices))
        width = f";max-width:{self.most_width}px" if self.most_width else ""
        text = f"<figcaption>{escape(self.text)}</figcaption>" if self.text else ""
        says = "".join(f'<p class="note says">{escape(note)}</p>' for note in notes)
        return (
            f'<figure class="chart" id="{escape(self.name)}">{text}{inputs}{says}{self._legend()}'
            f"{self.key}"
            f'<div class="plot" role="img" aria-label="{escape(self.label)}" '
            f'style="height:{self.figure.layout.height}px{width}"></div>{json_script(spec)}'
            "</figure>\n"
        )

    def _choice(self, number: int, choice: Choice) -> str:
        name, options = escape(f"{self.name}-{number}"), choice.options
        hidden = " hidden" if len(options) < 2 else ""
        if choice.slider:
            value = options[choice.chosen].label
            return (
                f'<div class="slider" data-choice="{number}"{hidden}>'
                f'<button type="button" class="play">Play</button>'
                f'<input type="range" min="0" max="{len(options) - 1}" value="{choice.chosen}" '
                f'step="1" aria-label="{escape(choice.label)}" aria-valuetext="{escape(value)}" '
                f'id="{name}"><output for="{name}">{escape(value)}</output></div>'
            )
        radios = "".join(
            f'<label><input type="radio" name="{name}" value="{index}"'
            f"{' checked' * (index == choice.chosen)}><span>{escape(option.label)}</span></label>"
            for index, option in enumerate(options)
        )
        return (
            f'<fieldset class="buttons" data-choice="{number}"{hidden}>'
            f"<legend>{escape(choice.label)}</legend>{radios}</fieldset>"
        )

    def _legend(self) -> str:
        if not self.legend:
            return ""
        return (
            '<div class="legend" role="group" aria-label="lines shown">'
            + "".join(
                f'<label><input type="checkbox" data-traces="{" ".join(map(str, e.traces))}"'
                f"{' checked' * e.shown}>{swatch(e.colour, e.dash)}{escape(e.name)}</label>"
                for e in self.legend
            )
            + "</div>"
        )


def json_script(value: Any, name: str = "") -> str:
    """Return a script element with JSON, no text of which can end the element."""
    text = to_json_plotly(value).replace("<", "\\u003c")
    return f'<script type="application/json"{f" id={name}" if name else ""}>{text}</script>'


_STROKES = {"solid": "", "dash": "7 3", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 3"}


def swatch(colour: str, dash: str) -> str:
    """Return a picture of a piece of a line."""
    return (
        '<svg width="28" height="10" aria-hidden="true"><line x1="1" x2="27" y1="5" y2="5" '
        f'stroke="{colour}" stroke-width="3" stroke-dasharray="{_STROKES[dash]}"/></svg>'
    )


def look(index: int) -> tuple[str, str, str]:
    """Return colour, dash and symbol of a line: neighbours differ in all, others in some."""
    dash = DASHES[(index + index // len(LINES)) % len(DASHES)]
    return LINES[index % len(LINES)], dash, SYMBOLS[index % len(SYMBOLS)]


def plain(text: str) -> str:
    """Escape text for a figure, which would read tags in it."""
    return escape(text, quote=False)


def blank(height: int, **layout: Any) -> go.Figure:
    """Return a figure without traces, as wide as the page.

    Args:
        height: In pixels.
        layout: Changes of the layout.
    """
    axis = {"automargin": True, "ticks": "", "zeroline": False, "ticklabelstandoff": 4}
    quiet = {name: {"showscale": False} for name in (SHARES, COUNTS, RANKS, BUDGETS)}
    figure = go.Figure()
    figure.update_layout(
        height=height, margin=MARGIN, showlegend=False, dragmode=False, hovermode="closest",
        font={"family": "system-ui, sans-serif", "size": 12}, xaxis=axis, yaxis=axis, **quiet,
    )  # fmt: skip
    return figure.update_layout(layout)


def scale_key(least: str, most: str, alarm: str = "") -> str:
    """Return HTML that says what the colours of a heat map mean: its ends, and the alarm."""
    over = f'<i class="alarm"></i><span>{escape(alarm)}</span>' if alarm else ""
    ends = f"<span>{escape(least)}</span><i></i><span>{escape(most)}</span>"
    return f'<p class="scale">{ends}{over}</p>'


def templates() -> dict[str, Any]:
    """Return what colours follow the theme: a Plotly template each for light and dark."""
    return {theme: _template(theme).to_plotly_json() for theme in (LIGHT, DARK)}


def _template(theme: str) -> go.layout.Template:
    low, high = SCALE[theme]
    axis = {
        "gridcolor": GRID[theme], "linecolor": GRID[theme], "zerolinecolor": GRID[theme],
        "title": {"standoff": 8},
    }  # fmt: skip
    return go.layout.Template(
        layout={
            "font": {"color": INK[theme]},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "colorway": [DRAWN[theme]],
            "hoverlabel": {
                "bgcolor": PAPER[theme], "bordercolor": INK[theme], "font": {"color": INK[theme]},
            },
            SHARES: {"colorscale": [[0, low], [1, high]]},
            COUNTS: {"colorscale": [[0, ALARM], [1e-6, ALARM], [1e-6, low], [1, high]]},
            RANKS: {"colorscale": [[0, low], [1, high]]},
            BUDGETS: {"colorscale": [[0, low], [0.5, high], [0.5 + 1e-6, ALARM], [1, ALARM]]},
        },
    )  # fmt: skip
