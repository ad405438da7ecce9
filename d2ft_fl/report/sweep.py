"""A sweep's page."""

from html import escape

from d2ft_fl.report import sweep_charts, sweep_tables
from d2ft_fl.report.curves import curves
from d2ft_fl.report.format import heading, metric_format, metric_label
from d2ft_fl.report.frame import (
    FOLDER,
    cards,
    configuration,
    details,
    page,
    section,
    sentence,
    versions,
)
from d2ft_fl.report.sweep_folder import FINISHED, SEED, Setting, SweepFolder

MOST_NAMES = 3  # of keys, in the title
MOST_NUMERIC = 2  # varied numbers, beyond which a chart over one of them mixes too much


def sweep_html(sweep: SweepFolder) -> list[str]:
    """Return the page of a sweep, or of what there is of it so far, in pieces.

    Raises:
        ConfigError: When no trial has a finished round.
    """
    spec, ranked = sweep.spec, sweep.ranked()
    primary = metric_label(spec.primary)
    finished = [s for s in ranked if s.finished]
    rest = [s for s in sweep.settings if s not in ranked]
    unfinished = [t for t in sweep.trials if t.status != FINISHED]
    names = sweep.several[:MOST_NAMES] or [SEED]
    more = ", and more" if len(sweep.several) > MOST_NAMES else ""
    title = f"Sweep of {', '.join(names)}{more}: {len(sweep.settings)} settings"
    body = [
        _stands(sweep),
        _headline(sweep, finished),
        section("Settings", _settings(sweep, [*ranked, *rest])),
        section(heading(primary), curves(ranked, spec).html()),
        section(f"Final {primary}", sweep_charts.dots(finished, spec).html() if finished else ""),
        *_over_keys(sweep, [s for s in finished if not s.selected]),
        *_compared(sweep),
        section("Not finished", sweep_tables.unfinished(sweep, unfinished)) if unfinished else "",
        section("Configuration", _configuration(sweep)),
        section("Made with", versions([t.run.versions for t in sweep.trials if t.run])),
    ]
    return page(title, "".join(body))


def _stands(sweep: SweepFolder) -> str:
    """Say how much is left of a sweep that has not come to its end."""
    left = [t for t in sweep.trials if t.status in ("waiting", "running")]
    if not left:
        return ""
    text = f"This sweep is not finished: {len(left)} of {len(sweep.trials)} trials are left."
    return sentence(text, "alert")


def _headline(sweep: SweepFolder, finished: list[Setting]) -> str:
    trials = sweep.trials
    figures = [
        ("settings", f"{len(sweep.settings):,}", ""),
        ("seeds", f"{len({t.settings.get(SEED) for t in trials}):,}", ""),
        ("trials", f"{len(trials):,}", f"{sum(t.finished for t in trials):,} finished"),
    ]
    if finished and not (best := finished[0]).selected:
        primary = sweep.spec.primary
        mean = best.metric(primary)
        text = metric_format(sweep.spec, primary).mean_text(mean.mean, mean.half)
        figures.append((f"best final {metric_label(primary)}", text, best.label))
    bound = [t.run for t in trials if t.run and not t.run.reference]
    broken = sum(run.totals["violations"] for run in bound)
    some = len(bound) < sum(t.run is not None for t in trials)
    figures.append(("violations", f"{broken:,}", "of budgets" + ", references left out" * some))
    return cards(figures)


def _settings(sweep: SweepFolder, rows: list[Setting]) -> str:
    text = (
        f"Means over finished seeds, of {metric_label(sweep.spec.primary)} with the 95 % "
        "confidence interval (Student's t) where there are two seeds or more. Shares are of "
        "training everything, bytes and simulated time of a whole run."
    )
    if any(s.selected for s in rows):
        text += (
            " Settings with trials that were stopped early come after the others, and are in no "
            "comparison: the seeds that are left are their better ones."
        )
    return sentence(text, "note") + sweep_tables.settings(sweep, rows)


def _over_keys(sweep: SweepFolder, finished: list[Setting]) -> list[str]:
    """Draw the final primary metric over each varied number, where there are one or two."""
    keys, primary = sweep.numeric_keys, metric_label(sweep.spec.primary)
    if not finished or len(keys) > MOST_NUMERIC:
        return []
    return [
        section(f"Final {primary} over {key}", sweep_charts.over_key(sweep, finished, key).html())
        for key in keys
    ]


def _compared(sweep: SweepFolder) -> list[str]:
    """Compare pairs of trials that differ in one word alone."""
    keys = [k for k in sweep.word_keys if 2 <= len(sweep.best_first(k)) <= sweep_charts.MOST_WORDS]
    return [
        section(
            f"By {key}, pairwise",
            sweep_charts.compared(sweep, key).html(),
            details("All pairs", sweep_tables.pairs(sweep, key)),
        )
        for key in keys
    ]


def _configuration(sweep: SweepFolder) -> str:
    configs = [t.run.config for t in sweep.trials if t.run]
    common = {k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs[1:])}
    others = [k for k in configs[0] if k not in common and k not in (*sweep.keys, SEED, FOLDER)]
    differ = sentence(f"Trials also differ in {', '.join(others)}.") if others else ""
    asked = sweep.folder / "sweep.toml"
    text = asked.read_text(encoding="utf-8", errors="replace") if asked.is_file() else ""
    as_asked = details("The sweep as it was asked for", f"<pre>{escape(text)}</pre>")
    note = sentence("What all trials have in common.", "note")
    return note + configuration(common) + differ + (as_asked if text else "")
