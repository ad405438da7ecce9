"""What pages share: frame, style, tables. A page is one file that asks nothing of a network."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from d2ft_fl.errors import ConfigError
from d2ft_fl.util.toml import dump_toml

# Colour-blind safe, Okabe & Ito.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
ALARM = "#D55E00"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d8dee4;
  --bar: #cfe3f1; --over: #f3c9ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #0f1419; --line: #2c343d; --bar: #12405f;
    --over: #6b3410; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .note { color: var(--soft); }
figure { margin: 1rem 0; padding: .5rem; border: 1px solid var(--line); border-radius: 8px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } .word { text-align: left; }
.share { background: linear-gradient(90deg, var(--bar) var(--used), transparent 0); }
.over { background: var(--over); }
pre { overflow-x: auto; font-size: .8rem; padding: .75rem; border: 1px solid var(--line);
  border-radius: 8px; }
"""


def document(title: str, body: Iterable[str], style: str = "", head: str = "") -> list[str]:
    """Return a whole page in pieces; some are megabytes, which are not copied into one.

    Args:
        title: Plain text.
        body: HTML.
        style: CSS, beside ``STYLE``.
        head: HTML of the head.
    """
    begin = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        "<body>"
    )
    return [begin, *body, "</body></html>\n"]


def write(pieces: Iterable[str], path: Path) -> None:
    """Write a page.

    Raises:
        ConfigError: When the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            file.writelines(piece.encode() for piece in pieces)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """Return the error that says why a file cannot be written."""
    return ConfigError(
        f"--output {str(path)!r} cannot be written: {error.strerror or error}; name another file"
    )


def table(heads: Sequence[str], rows: Iterable[str], words: int = 0, sortable: bool = False) -> str:
    """Return a table that scrolls in a box of its own.

    Args:
        heads: Heads of the columns.
        rows: The cells of each row, as :func:`cells` makes them.
        words: How many of the first columns hold words.
        sortable: Whether heads are buttons, for a page's script.
    """
    kinds = ["word"] * words + ["number"] * (len(heads) - words)
    kind = ' class="sortable"' if sortable else ""
    begin, end = ('<button type="button">', "</button>") if sortable else ("", "")
    top = "".join(
        f'<th class="{kind}" scope="col">{begin}{escape(head)}{end}</th>'
        for kind, head in zip(kinds, heads, strict=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{top}</tr>'
        f"</thead><tbody>\n{body}</tbody></table></div>"
    )


def cells(*texts: str) -> str:
    """Return cells of numbers."""
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def valued(text: str, value: float | None) -> str:
    """Return a cell of a number that sorts by ``value``; None or NaN comes last."""
    known = value is not None and value == value
    return f'<td data-value="{value:.6g}">{escape(text)}</td>' if known else cells("-")


def words(*texts: str) -> str:
    """Return cells of words."""
    return "".join(f'<td class="word">{escape(text)}</td>' for text in texts)


def share_cell(text: str, share: float | None) -> str:
    """Return a cell with a bar of the used share of a budget, or marked where that is over 1."""
    if share is None:
        return cells(text)
    kind = "over" if share > 1 else "share"
    bar = f'style="--used:{min(1.0, share):.0%}"'
    return f'<td class="{kind}" {bar} data-value="{share:.4g}">{escape(text)}</td>'


def configuration(entries: Mapping[str, Any]) -> str:
    """Show options as TOML."""
    return f"<pre>{escape(dump_toml(dict(entries)))}</pre>"
