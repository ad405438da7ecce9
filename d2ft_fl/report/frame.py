"""The frame of a report, and parts that runs and sweeps have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.report import html
from d2ft_fl.report.charts import json_script, templates
from d2ft_fl.report.format import LIMIT_LABELS
from d2ft_fl.report.script import SCRIPT, STYLE

NAMES = {**LIMIT_LABELS, "bytes_up": "bytes up", "bytes_down": "bytes down"}  # of budgets
FOLDER = "run-folder"  # where a run lies is nobody else's business
FEW_LISTED, MOST_LISTED = 10, 500
# Whatever a page holds, a browser asks nobody for anything.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\">"
)


def page(title: str, body: str) -> list[str]:
    """Return a page with Plotly inside, in pieces.

    Args:
        title: Plain text.
        body: HTML, with what :meth:`d2ft_fl.report.charts.Chart.html` returns in it.
    """
    parts = [
        f"<main><h1>{escape(title)}</h1>",
        body,
        "</main><noscript><p>The charts need JavaScript; the tables hold the same numbers.</p>"
        f"</noscript>{json_script(templates(), 'templates')}<script>",
        get_plotlyjs(),
        f"</script><script>{SCRIPT}</script>",
    ]
    return html.document(title, parts, STYLE, POLICY)


def section(heading: str, *parts: str) -> str:
    """Return a heading and what comes under it; nothing where that is nothing."""
    body = "".join(parts)
    return f"<h2>{escape(heading)}</h2>{body}\n" if body else ""


def sentence(text: str, kind: str = "") -> str:
    """Return a paragraph; ``kind`` is note or alert."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def details(summary: str, body: str) -> str:
    """Return what a reader opens to see."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def listed(texts: Sequence[str]) -> str:
    """Return a list; a long one is for a reader to open, and has ``MOST_LISTED`` lines."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts[:MOST_LISTED])
    more = len(texts) - MOST_LISTED
    body = f"<ul>{items}</ul>" + (sentence(f"and {more:,} more", "note") if more > 0 else "")
    return body if len(texts) <= FEW_LISTED else details(f"{len(texts):,} lines", body)


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return headline figures: what each is, its value, and a few words beside it."""
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
            + (f'<dd class="note">{escape(note)}</dd>' if note else "")
            + "</div>"
            for name, value, note in figures
        )
        + "</dl>"
    )


def configuration(entries: Mapping[str, Any]) -> str:
    """Show options: what differs from the defaults in a sentence, and all of them as TOML."""
    known = RunConfig().to_mapping()
    changes = {k: v for k, v in entries.items() if k in known and k != FOLDER and v != known[k]}
    changed = ", ".join(f"{key} = {value}" for key, value in changes.items())
    text = f"Other than the defaults: {changed}." if changes else "All options are the defaults."
    shown = {key: value for key, value in entries.items() if key != FOLDER}
    return sentence(text) + details("All options", html.configuration(shown))


def versions(answers: Sequence[Mapping[str, Any]]) -> str:
    """Show versions that runs were made with, a column for each different answer."""
    different = [v for n, v in enumerate(answers) if v and v not in answers[:n]]
    if not different:
        return sentence("This was not recorded.", "note")
    packages = [v.get("packages", {}) for v in different]
    texts = {name: [say(v) for v in different] for name, say in _VERSIONS.items()}
    for name in dict.fromkeys(name for names in packages for name in names):
        texts[name] = [names.get(name) or "none" for names in packages]
    one = len(different) == 1
    heads = ["what", *("version" if one else f"runs {n + 1}" for n in range(len(different)))]
    rows = [html.words(name, *columns) for name, columns in texts.items()]
    return html.table(heads, rows, len(heads))


def _code(v: Mapping[str, Any]) -> str:
    if not v.get("commit"):
        return "from no git checkout that is known"
    return f"commit {v['commit'][:12]}" + (", with changes" if v.get("changed") else "")


_VERSIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "code": _code,
    "python": lambda v: str(v.get("python")),
    "system": lambda v: f"{v.get('system')}, {v.get('machine')}, {v.get('cpus')} CPUs",
    "GPU": lambda v: v.get("gpu") or "not used",
    "torch threads": lambda v: str(v.get("torch_threads")),
}
