"""What is generated from the options: the section of ``pyproject.toml`` and ``docs/options.md``.

Run this module (``make options``) to write both anew after a change of an option.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2ft_fl.config.option import TYPE_NAMES, Option
from d2ft_fl.config.renamed import RENAMED
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.util.strict_json import write_json

SECTION = "[tool.flwr.app.config]\n"
END = "# -- end of the options (`make options`)\n"
WIDTH = 100

_HEAD = """# Options

Every option of a run, as `d2ft options --markdown` prints them. Set one with
`d2ft run --set NAME=VALUE`, several in a TOML file with `d2ft run --config FILE`, or with Flower's
own `flwr run . --run-config "NAME=VALUE"`. `d2ft options --toml` prints a file to begin with, and
`d2ft options NAME` one option in full.
"""


def toml_value(value: Any) -> str:
    """Return a value as TOML spells it, small numbers with an exponent."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return write_json(value, ensure_ascii=False)


def allowed_words(option: Option) -> str:
    """Return what an option may be, where its type and its sentence do not say it."""
    empty = " or empty" if "" in option.choices else ""
    return option.allowed + empty


def by_group(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Return options by the titles of their groups, in their order."""
    groups: dict[str, list[Option]] = {}
    for one in options:
        groups.setdefault(one.group, []).append(one)
    return groups


def to_toml(options: Iterable[Option]) -> str:
    """Return options with their defaults as TOML, each after what it means."""
    lines = []
    for group, members in by_group(options).items():
        lines += [f"# -- {group}"]
        for one in members:
            facts = [allowed_words(one), one.unit]
            told = "; ".join(filter(None, facts))
            text = f"{one.text} ({told})" if told else one.text
            lines += textwrap.wrap(
                text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
            lines.append(f"{one.key} = {toml_value(one.default)}")
        lines.append("")
    return "\n".join(lines)


def to_markdown(options: Iterable[Option]) -> str:
    """Return the page of options: a table a group."""
    parts = [_HEAD]
    for group, members in by_group(options).items():
        rows = [
            f"| `{one.key}` | `{toml_value(one.default)}` | {TYPE_NAMES[one.kind]} "
            f"| {_cell(allowed_words(one))} | {one.unit} | {_cell(one.text)} |"
            for one in members
        ]
        head = ["| option | default | type | allowed | unit | what it does |", "| --- " * 6 + "|"]
        parts.append("\n".join([f"\n## {group}\n", *head, *rows, ""]))
    old = [f"| `{old}` | `{now}` |" for old, now in RENAMED.items()]
    parts.append(
        "\n## Old names\n\nFiles, `--set` and sweeps may go on using an old name; a line says what "
        "the option is called\nnow. Flower's own `--run-config` knows the present names only.\n\n"
        + "\n".join(["| old | now |", "| --- | --- |", *old, ""])
    )
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def with_section(pyproject: str) -> str:
    """Return the text of a ``pyproject.toml`` with the options between its markers written anew."""
    begin = pyproject.index(SECTION) + len(SECTION)
    end = pyproject.index(END)
    return pyproject[:begin] + to_toml(OPTIONS.values()) + pyproject[end:]


def main() -> None:
    """Write both files of this checkout."""
    root = Path(__file__).parents[2]
    project = root / "pyproject.toml"
    project.write_text(with_section(project.read_text()))
    root.joinpath("docs", "options.md").write_text(to_markdown(OPTIONS.values()))


if __name__ == "__main__":
    main()
