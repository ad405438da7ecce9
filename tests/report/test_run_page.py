"""Pages of runs: what they say, of whole and of broken-off runs, and how large they get."""

import re
import time

import numpy as np
import pytest

from d2ft_fl.report import html as pages
from d2ft_fl.report import run_charts
from d2ft_fl.report.pages import run_page
from d2ft_fl.report.run import run_html
from d2ft_fl.report.run_folder import RunFolder
from d2ft_fl.rounds.checks import checked
from d2ft_fl.runtime.in_process import run_local
from tests.report.made_up import (
    ALLOWED,
    FULL,
    client_row,
    distance_run,
    plan_of,
    round_row,
    simple_run,
    sits_out,
    write_run,
)

ONE_ROUND = {"rounds": 1, "clients": 2, "train_examples": 40}
LIMIT = 8_000_000  # bytes of a page


def html(folder):
    """A page without its scripts, and with its entities read."""
    text = "".join(run_html(RunFolder.read(folder)))
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def card(text, name):
    return re.search(rf"<dt>{name}</dt><dd>(.*?)</dd>", text)[1]


def test_headline_figures(tmp_path):
    """Of two rounds with two clients each: 300 of 1,000 FLOPs, 2 seconds a round."""
    text = html(simple_run(tmp_path, (0.625, 0.5)))
    assert card(text, "accuracy") == "50.0%"
    assert card(text, "best accuracy") == "62.5%"
    assert "after round 1</dd>" in text
    assert [card(text, name) for name in ("FLOPs", "memory", "bytes up", "bytes down")] == [
        "30%", "40%", "40%", "75%",
    ]  # fmt: skip
    assert card(text, "simulated time") == "4 s"
    assert "<h1>d2ft: 2 clients of vit_glyphs on digits, seed 0</h1>" in text
    assert 'role="alert"' not in text
    assert 'class="alert"' not in text


def test_a_metric_that_is_minimised_is_a_number_whose_best_is_the_least(tmp_path):
    folder = distance_run(tmp_path, (3.0, 1.25, 2.0))
    text = html(folder)
    assert card(text, "distance") == "2.000"
    assert card(text, "best distance") == "1.250"
    assert "after round 2</dd>" in text
    assert "<h2>Distance</h2>" in text
    assert "After round 3 distance is 2.000." in text
    assert '<th class="number" scope="col">distance</th>' in text
    assert "<td>1.250</td><td>44.4%</td>" in text  # within 1 of 2.25
    offered = re.findall(r'name="progress-0".*?<span>(.*?)</span>', text)
    assert offered == ["distance", "within", "training loss"]


def test_charts_of_metrics_have_their_formats(tmp_path):
    chart = run_charts.progress(RunFolder.read(distance_run(tmp_path, (3.0, 1.25))))
    options = {option.label: option for option in chart.choices[0].options}
    assert options["distance"].layout["yaxis.tickformat"] == ""
    assert options["within"].layout["yaxis.tickformat"] == ".0%"
    assert options["within"].note == "Within of the global model on the held-out examples."
    assert options["training loss"].data["visible"] == [False, False, True]


def test_the_tables_hold_the_figures(tmp_path):
    """FLOPs: 2 clients, 2 rounds of 300, of 1,000 each; half of a budget of 600."""
    text = html(simple_run(tmp_path))
    used = "<td>1.2 kFLOP</td><td>4 kFLOP</td><td>30%</td><td>60%</td><td>50.0%</td>"
    assert f'<td class="word">FLOPs, all clients and rounds</td>{used}' in text
    assert "<td>600 B</td><td>800 B</td><td>75%</td><td>any</td><td>no budget</td>" in text
    assert text.count('style="--used:50%" data-value="0.5">600 FLOP 50%</td>') == 2 + 2
    assert text.count('style="--used:80%" data-value="0.8">80 B 80%</td>') == 2 + 2


def test_the_policy_that_clients_used_most_often(tmp_path):
    """Client 0 always the same; client 1 as configured in one round of three."""
    narrow = {"accumulate": 4, "checkpointing": None, "bits_up": 8, "bits_down": None}
    again = {"accumulate": 1, "checkpointing": True}
    lines = []
    for number, other in enumerate((again, {}, again), 1):
        rows = [client_row(number, 0, policy=narrow), client_row(number, 1, way=other)]
        lines.append((round_row(number, 0.5, rows), rows))
    text = html(write_run(tmp_path, lines))
    assert '<td class="word">4 micro-batches, 8 bits up</td>' in text
    assert '<td class="word">checkpointing (67%)</td>' in text


def test_a_budget_that_was_broken_is_marked_and_listed(tmp_path):
    rows = [client_row(1, 0, used={**FULL, "flops": 900})]
    line = round_row(1, 0.5, rows, violations=["client 0: flops 900 of 600"])
    text = html(write_run(tmp_path, [(line, rows)]))
    assert "round 1, client 0: flops 900 of 600" in text
    assert '<td class="over" style="--used:100%" data-value="1.5">900 FLOP 150%</td>' in text


def test_faults_and_sitting_out(tmp_path):
    """In the second round one client failed; in the third everyone sat out."""
    nothing = {"used": None, "train_loss": None}
    first = [client_row(1, 0), client_row(1, 1)]
    second = [client_row(2, 0), client_row(2, 1, fault="no answer <b>", **nothing) | nothing]
    third = [sits_out(3, 0), sits_out(3, 1)]
    rounds = [(round_row(n, 0.5, rows), rows) for n, rows in enumerate((first, second, third), 1)]
    text = html(write_run(tmp_path, rounds))
    assert card(text, "faults") == "1"
    assert card(text, "sat out") == "2"
    assert "of 6 times" in text
    assert "round 2, client 1: no answer &lt;b&gt;" in text
    (row,) = (line for line in text.split("<tr>") if line.startswith('<td class="word">1</td>'))
    assert "<td>1</td><td>1</td>" in row  # client 1 sat out once, and failed once


def test_without_budgets_the_page_says_so(tmp_path):
    rows = [client_row(1, 0, allowed=dict.fromkeys(ALLOWED))]
    text = html(write_run(tmp_path, [(round_row(1, 0.5, rows), rows)]))
    assert "No client that worked has a budget." in text
    assert 'id="budgets"' not in text


def test_a_reference_is_named_as_one(tmp_path):
    folder = simple_run(tmp_path)
    (folder / "summary.json").write_text(
        '{"strategy": "fedavg", "keeps_budgets": false, "wall_seconds": 1}'
    )
    assert "fedavg is a reference and does not look at budgets." in html(folder)


def test_lora_has_ranks_and_an_aggregation_error(tmp_path):
    rounds = []
    for number in (1, 2):
        rows = [client_row(number, client, rank=2.0 + client) for client in range(2)]
        rounds.append((round_row(number, 0.5, rows, aggregation_error=0.25 * number), rows))
    ranks = [np.full((2, 2, 3), 4)] * 2
    text = html(write_run(tmp_path, rounds, ranks=ranks))
    assert card(text, "aggregation error") == "0.38"
    assert "<span>aggregation error</span>" in text
    assert "<span>mean rank</span>" in text
    assert '<td data-value="3">3</td>' in text


def test_robust_folding_says_how_many_slices_stayed_as_they_were(tmp_path):
    rows = [client_row(1, client) for client in range(2)]
    text = html(write_run(tmp_path, [(round_row(1, 0.5, rows, too_few_trainers=0.4), rows)]))
    assert card(text, "slices left") == "40%"


@pytest.mark.parametrize(
    "status,reason,said",
    [
        ("running", "", "This run is not finished (running). 2 of 5 rounds are finished"),
        ("failed", "lost power", "This run failed: lost power. 2 of 5 rounds are finished"),
    ],
)
def test_what_broke_off_says_so_at_its_top(tmp_path, status, reason, said):
    folder = simple_run(tmp_path, config={"rounds": 5}, status=status, reason=reason)
    text = html(folder)
    assert f'<p class="alert">{said}' in text
    assert text.index('class="alert"') < text.index('class="cards"')


def test_names_of_others_are_text(tmp_path):
    rows = [client_row(1, 0, device="<img src=x>")]
    text = "".join(run_html(RunFolder.read(write_run(tmp_path, [(round_row(1, 0.5, rows), rows)]))))
    assert "<img" not in text.replace(text[text.index("<script>") :], "")


def test_the_configuration_and_what_is_not_the_default(tmp_path):
    text = html(simple_run(tmp_path, config={"lr": 0.25, "strategy": "random"}))
    assert "Other than the defaults: strategy = random, rounds = 2, clients = 2, lr = 0.25." in text
    assert "lr = 0.25\n" in text
    assert "This was not recorded." in text


@pytest.mark.parametrize("clients,rounds,shape", [(200, 100, (12, 12)), (1000, 3, (12, 12))])
def test_large_runs_have_pages_of_less_than_eight_megabytes(tmp_path, clients, rounds, shape):
    rows = [client_row(1, client) for client in range(clients)]
    line = round_row(1, 0.5, rows)
    every = [
        (line | {"round": number}, [row | {"round": number} for row in rows])
        for number in range(1, rounds + 1)
    ]
    plan = plan_of(clients, 1, *shape)
    folder = write_run(tmp_path, every, [plan] * rounds)
    started = time.perf_counter()
    path = run_page(folder)
    assert time.perf_counter() - started < 10  # about 0.5 s; machines that test are busy
    assert path.stat().st_size < LIMIT
    text = path.read_text()
    assert "A row is a device class, with how many clients it has." in text
    assert f"<summary>All {clients:,} clients</summary>" in text


def test_a_run_ends_with_its_page(quick, tmp_path):
    config = checked(quick())
    summary = run_local(config)
    folder = RunFolder.read(tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"<dd>{summary['accuracy']:.1%}</dd>" in text
    assert "This run is not finished" not in text
    assert set(folder.versions["packages"]) >= {"torch", "flwr", "timm", "peft", "numpy", "d2ft-fl"}
    assert f">{folder.versions['packages']['torch']}</td>" in text
    assert folder.totals["accuracy"] == summary["accuracy"]


def test_a_trial_of_a_sweep_has_no_page(quick, tmp_path):
    run_local(checked(quick(**ONE_ROUND)), report=False)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_page_that_cannot_be_written_costs_no_result(quick, tmp_path, monkeypatch, caplog):
    def fails(text, path):
        raise OSError("no space left")

    monkeypatch.setattr(pages, "write", fails)
    summary = run_local(checked(quick(**ONE_ROUND)))
    assert summary["rounds"] == 1
    assert RunFolder.read(tmp_path / "run").status == "finished"
    assert "report.html was not written: OSError: no space left" in caplog.text
