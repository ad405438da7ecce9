"""The pages of a run and of a sweep, opened in a headless Chromium."""

import pytest

from d2ft_fl.report.pages import sweep_page
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime.in_process import run_local
from tests.browser import Browser, chromium
from tests.report.made_up import write_sweep

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no chromium or google-chrome is on PATH"
)
READY = "[...document.querySelectorAll('.plot')].every((p) => p.querySelector('.main-svg'))"
LEFT = "ArrowLeft", 37
INK = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
# Of every chart, how many of its marks are wider and higher than nothing.
MARKS = """
[...document.querySelectorAll('figure.chart')].map((figure) => [figure.id,
  [...figure.querySelectorAll('.lines path, path.point, .point path, .heatmaplayer image')]
    .map((mark) => mark.getBoundingClientRect()).filter((box) => box.width && box.height).length])
"""
CUT_OFF = """
[...document.querySelectorAll('.plot')].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].filter((text) => text.textContent).filter((text) => {
    const at = text.getBoundingClientRect();
    return at.width && (at.left < box.left - 1 || at.right > box.right + 1
      || at.top < box.top - 1 || at.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def run(browser, quick, tmp_path):
    run_local(checked(quick(slots=2)))
    return browser.open(tmp_path / "run" / "report.html")


@pytest.fixture
def sweep(browser, tmp_path):
    trials = [
        ({"strategy": strategy, "lr": lr, "seed": seed}, 0.5 + lr + 0.01 * seed)
        for strategy in ("d2ft", "random")
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    return browser.open(sweep_page(write_sweep(tmp_path, trials)))


def says(page, name):
    return page(f"[...document.querySelectorAll('#{name} .says')].map((p) => p.textContent)")


def press(page, name, label):
    """Choose by a button's text, as a click on it does."""
    page(
        f"[...document.querySelectorAll('#{name} .buttons label')]"
        f".find((label) => label.textContent === '{label}').click()"
    )


def title(page, name, axis):
    return page(f"document.querySelector('#{name} .{axis}title').textContent")


def fits(page):
    """On a phone: nothing is wider than the window but what scrolls in a box of its own."""
    page.resize(390)
    page.wait("document.documentElement.clientWidth <= 390")
    page.wait(
        "[...document.querySelectorAll('.main-svg')].every((svg) => svg.clientWidth <= innerWidth)"
    )
    assert page("document.documentElement.scrollWidth <= innerWidth")
    assert page(CUT_OFF) == []


def darkens(page):
    """Charts follow the theme while the page is open."""
    light, paper = page(INK), page("getComputedStyle(document.body).backgroundColor")
    page.dark()
    page.wait(f"{INK} !== '{light}'")
    assert page("getComputedStyle(document.body).backgroundColor") != paper


def test_a_runs_page(run):
    run.wait(READY)
    marks = dict(run(MARKS))
    assert set(marks) == {"progress", "coverage", "who", "classes", "budgets"}
    assert all(marks.values()), marks
    assert run(CUT_OFF) == []

    # The slider, by its keys: another round's label, sentence and numbers.
    cells = (
        "[...document.querySelectorAll('#coverage .heatmap-label text')]"
        ".map((text) => text.textContent).join()"
    )
    label = "document.querySelector('#coverage output').textContent"
    before = run(cells)
    assert len(before.split(",")) == 36
    assert run(label) == "round 2 of 2"
    said = says(run, "coverage")
    run("document.querySelector('#coverage input[type=range]').focus()")
    run.key(*LEFT)
    run.wait(f"{label} === 'round 1 of 2'")
    run.wait(f"{cells} !== '{before}'")
    assert says(run, "coverage") != said
    assert run("document.activeElement.getAttribute('aria-valuetext')") == "round 1 of 2"
    run("document.querySelector('#coverage .play').click()")
    run.wait(f"{label} === 'round 2 of 2' && {cells} === '{before}'")

    # Other operations, other axes.
    press(run, "coverage", "FROZEN")
    run.wait(f"{cells} !== '{before}'")
    assert "FROZEN: the gradient passes" in says(run, "coverage")[0]
    assert title(run, "progress", "x") == "round"
    for over, expected in (
        ("FLOPs", "FLOP so far, all clients"),
        ("bytes up", "B sent up so far, all clients"),
        ("simulated time", "simulated seconds so far"),
    ):
        press(run, "progress", over)
        run.wait(f"document.querySelector('#progress .xtitle').textContent.includes('{expected}')")
    press(run, "progress", "loss")
    run.wait("document.querySelector('#progress .ytitle').textContent === 'loss'")
    assert run("document.querySelectorAll('#progress .lines path').length") == 2
    press(run, "who", "by subnet")
    run.wait("document.querySelector('#who .xtitle').textContent === 'block.head'")

    fits(run)
    darkens(run)
    assert run.told() == []


def test_a_sweeps_page(sweep):
    sweep.wait(READY)
    marks = dict(sweep(MARKS))
    assert set(marks) == {"curves", "dots", "over-lr", "compared-strategy"}
    assert all(marks.values()), marks
    assert sweep(CUT_OFF) == []

    # A column sorts, numbers by what they are, and back.
    column = "document.querySelector('.sortable').tBodies[0].rows[0].cells[2].textContent"
    head = "document.querySelectorAll('.sortable th')[2]"
    assert sweep(column).startswith("70.5%")
    sweep(f"{head}.querySelector('button').click()")
    assert sweep(f"{head}.getAttribute('aria-sort')") == "descending"
    assert sweep(column).startswith("70.5%")
    sweep(f"{head}.querySelector('button').click()")
    assert sweep(column).startswith("60.5%")

    # The legend switches lines, buttons the axis.
    lines = "document.querySelectorAll('#curves .lines path.js-line').length"
    drawn = sweep(lines)
    sweep("document.querySelector('#curves .legend input').click()")
    sweep.wait(f"{lines} < {drawn}")
    press(sweep, "curves", "bytes up")
    sweep.wait("document.querySelector('#curves .xtitle').textContent.startsWith('B sent up')")
    first = says(sweep, "compared-strategy")
    press(sweep, "compared-strategy", "random")
    assert says(sweep, "compared-strategy") != first

    fits(sweep)
    darkens(sweep)
    assert sweep.told() == []


def test_what_the_pages_ask_for_would_be_seen(browser, tmp_path):
    """The checks above see a message, an error and a request."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.log('hello'); undefinedName()</script>"
    )
    page = browser.open(path)
    page.wait("document.images.length === 1")
    told = "\n".join(page.told())
    for part in ("hello", "undefinedName", "http://127.0.0.1:9/x.png"):
        assert part in told
