"""A sweep's settings as a table in Markdown, to be quoted."""

from typing import Any

from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import ConfigError
from d2ft_fl.report.format import metric_format, metric_label
from d2ft_fl.report.sweep_folder import STOPPED, Setting, SweepFolder
from d2ft_fl.tasks.metrics import MetricSpec

SHARES = ("FLOPs", "memory", "bytes up", "bytes down")  # of training everything, as RESOURCES


def sweep_markdown(sweep: SweepFolder, across: str = "") -> str:
    """Make a table of settings with a finished trial, the best first; shares in per cent.

    Args:
        sweep: The sweep.
        across: A key that varies: settings that differ in nothing else share a row, with a column
            for each of its values; those with trials that were stopped early are left out. Without
            one, a row has what its setting used, too.

    Raises:
        ConfigError: When no trial has finished, or the key does not vary.
    """
    ranked = [s for s in sweep.ranked() if s.finished]
    if not ranked:
        raise ConfigError(f"no trial of the sweep in {str(sweep.folder)!r} has finished yet")
    if across and across not in sweep.several:
        known = ", ".join(sweep.several) or "nothing"
        raise ConfigError(f"{across!r} does not vary in this sweep; {known} does")
    if across:
        return _pivot(sweep, ranked, across)
    heads = ["setting", metric_label(sweep.spec.primary), *SHARES, "sat out", "seeds"]
    return _table(heads, [_line(setting, sweep.spec) for setting in ranked])


def _line(setting: Setting, spec: MetricSpec) -> list[str]:
    shares = [setting.figure("resources", name, "share").mean for name in RESOURCES]
    out, worked = (setting.figure(name).mean for name in ("sat_out", "client_rounds"))
    rest = [f"{share:.0%}" for share in (*shares, out / (out + worked))]
    seeds = f"{len(setting.finished)}" + f", {setting.count(STOPPED)} stopped" * setting.selected
    return [setting.label, _primary(setting, spec), *rest, seeds]


def _pivot(sweep: SweepFolder, ranked: list[Setting], across: str) -> str:
    ranked = [s for s in ranked if not s.selected]
    values = sorted({s.values[across] for s in ranked}, key=sweep.values[across].index)
    rows: dict[str, dict[Any, str]] = {}
    for s in ranked:
        row = rows.setdefault(sweep.label(s.values, without=across), {})
        row[s.values[across]] = _primary(s, sweep.spec)
    heads = ["setting", *(f"{across} {sweep.word(across, value)}" for value in values)]
    return _table(heads, [[k, *(row.get(v, "") for v in values)] for k, row in rows.items()])


def _primary(setting: Setting, spec: MetricSpec) -> str:
    i = setting.metric(spec.primary)
    return metric_format(spec, spec.primary).bare_text(i.mean, i.half)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
                   for line in lines)  # fmt: skip
