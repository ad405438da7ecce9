import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep import contents
from d2ft_fl.sweep.draws import Choice, Span
from d2ft_fl.sweep.reading import read_sweep
from d2ft_fl.sweep.spec import Asha, Group, RunOptions, Sweep
from d2ft_fl.sweep.trials import Trial, expand, sweep_hash, varied
from d2ft_fl.util.toml_lines import Locator

GRIDS = {
    "strategy": ("d2ft", "random", "fedavg"),
    "rounds": (2, 3, 5),
    "lr": (1e-3, 2e-3, 5e-3),
    "checkpointing": (False, True),
}
SEARCHES = {"head-lr": Span(1e-4, 1e-2, log=True), "batch-size": Span(4, 4096)}


def sweep_of(*groups, base=None, run=None):
    return Sweep("s", base or {}, groups, run or RunOptions(), Locator("s.toml", ""), {})


grids = st.fixed_dictionaries(
    {}, optional={k: st.permutations(v).flatmap(lambda p: st.sampled_from(
        [tuple(p[:n]) for n in range(1, len(p) + 1)])) for k, v in GRIDS.items()}
)  # fmt: skip
groups = st.builds(
    lambda grid, search, samples, seeds: Group(
        grid=grid, search=search, samples=samples if search else 0, seeds=tuple(seeds)
    ),
    grids,
    st.fixed_dictionaries({}, optional={k: st.just(v) for k, v in SEARCHES.items()}),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), max_size=3, unique=True),
)


@settings(max_examples=12, deadline=None)
@given(groups)
def test_trials_are_the_product_of_grid_draws_and_seeds(group):
    trials = expand(sweep_of(group))
    count = max(1, group.samples) * max(1, len(group.seeds))
    for values in group.grid.values():
        count *= len(values)
    assert len(trials) == count == len({trial.id for trial in trials})
    assert all(set(t.settings) == set(varied(sweep_of(group))) for t in trials)


@settings(max_examples=12, deadline=None)
@given(groups, groups, st.randoms(use_true_random=False))
def test_ids_know_neither_order_nor_what_else_there_is(group, other, random):
    ids = {trial.id for trial in expand(sweep_of(group))}
    assert ids <= {trial.id for trial in expand(sweep_of(other, group))}
    shuffled = Group(
        grid=dict(random.sample(list(group.grid.items()), len(group.grid))),
        search=dict(random.sample(list(group.search.items()), len(group.search))),
        samples=group.samples,
        seeds=tuple(random.sample(group.seeds, len(group.seeds))),
    )
    assert ids == {trial.id for trial in expand(sweep_of(shuffled))}


@settings(max_examples=12, deadline=None)
@given(groups, st.integers(0, 3))
def test_more_samples_leave_the_others_as_they_were(group, more):
    def with_samples(samples):
        return Group(grid=group.grid, search=SEARCHES, samples=samples, seeds=group.seeds)

    few = {trial.id for trial in expand(sweep_of(with_samples(2)))}
    assert few <= {trial.id for trial in expand(sweep_of(with_samples(2 + more)))}


def test_an_id_names_strategy_and_seed_and_hashes_all_options():
    (trial,) = expand(sweep_of(Group(grid={"strategy": ("random",)}, seeds=(7,))))
    entries = RunConfig(strategy="random", seed=7).to_mapping()
    entries["accumulate"] = entries.pop("micro-batches")  # what it was called at first
    options = json.dumps(entries, sort_keys=True)
    assert trial.id == f"random-seed7-{hashlib.sha256(options.encode()).hexdigest()[:10]}"


def test_what_is_configured_twice_is_one_trial():
    twice = Group(grid={"lr": (1e-3, 2e-3)})
    assert len(expand(sweep_of(twice, Group(place=("group", "0"), base={"lr": 1e-3})))) == 2
    assert len(expand(sweep_of(twice, Group(place=("group", "0"), base={"lr": 3e-3})))) == 3


def test_what_varies_wins_over_bases_and_a_groups_own_over_the_common_one():
    group = Group(("group", "0"), base={"lr": 2e-3, "rounds": 4}, grid={"rounds": (6,)}, seeds=(3,))
    (trial,) = expand(sweep_of(group, base={"lr": 1e-3, "clients": 5, "seed": 1}))
    assert (trial.config.lr, trial.config.clients, trial.config.rounds) == (2e-3, 5, 6)
    assert dict(trial.settings) == {"lr": 2e-3, "rounds": 6, "seed": 3}


def test_all_settings_come_with_the_first_seed_before_any_comes_with_the_next():
    trials = expand(sweep_of(Group(grid={"lr": (1e-3, 2e-3)}, seeds=(0, 1))))
    assert [(t.config.seed, t.config.lr) for t in trials] == list(
        itertools.product((0, 1), (1e-3, 2e-3))
    )


def test_groups_that_search_the_same_option_see_the_same_values():
    search = {"lr": Span(1e-4, 1e-2, log=True)}
    pairs = [
        Group(("group", str(n)), base={"strategy": name}, search=search, samples=3)
        for n, name in enumerate(("d2ft", "random"))
    ]
    trials = expand(sweep_of(*pairs))
    assert [t.config.lr for t in trials[:3]] == [t.config.lr for t in trials[3:]]


def test_the_hash_of_a_sweep_knows_its_trials_and_its_early_stopping():
    def hashed(seeds, asha=None):
        sweep = sweep_of(Group(seeds=seeds), run=RunOptions(at_once=len(seeds), asha=asha))
        return sweep_hash(sweep, expand(sweep))

    assert hashed((0, 1)) == hashed((1, 0))
    assert len({hashed((0, 1)), hashed((0, 1, 2)), hashed((0, 1), Asha())}) == 3


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "[grid]\nstrategy = ['d2ft', 'best']",
            "s.toml:2: grid.strategy: no trial runs with 'best'",
        ),
        (
            "[grid]\nslots = [1, 20]",
            "s.toml:2: grid.slots: no trial runs with 20: .*batch-size = 16",
        ),
        (
            "[base]\nexploration = 2\n[grid]\nlr = [1]",
            "s.toml:2: base.exploration: exploration = 2",
        ),
        ("seeds = [-1, 0]", "s.toml:1: seeds: no trial runs with -1: seed = -1 must be 0 or more"),
        ("[search]\nsamples = 2\nlr = {min = -1, max = 1}", "s.toml:3: search.lr: .* -1.0"),
        ("[search]\nsamples = 1\nplanner = {choice = ['joint', 'x']}", "no trial runs with 'x'"),
        ("[[group]]\n[[group]]\n\n[group.base]\nrounds = 0", "s.toml:5: group.base.rounds: rounds"),
        ("config = 'c.toml'", "c.toml: clients = 0 must be 1 or more"),
        (
            "[run]\nasha = {grace-rounds = 10}",
            "s.toml:2: run.asha: grace-rounds = 10 leaves nothing",
        ),
    ],
)
def test_a_value_that_no_trial_takes_is_refused_with_its_line(text, message, tmp_path):
    tmp_path.joinpath("c.toml").write_text("clients = 0")
    tmp_path.joinpath("s.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        expand(read_sweep(tmp_path / "s.toml"))
    assert "\n" not in str(error.value)


def test_values_that_do_not_fit_together_are_one_trial_refused(tmp_path):
    tmp_path.joinpath("s.toml").write_text("[grid]\nslots = [1, 12]\nbatch-size = [8, 16]")
    refused = [t.settings for t in expand(read_sweep(tmp_path / "s.toml")) if t.refused]
    assert refused == [{"slots": 12, "batch-size": 8}]


def test_choices_are_drawn_from_all_values():
    drawn = expand(sweep_of(Group(search={"batch-size": Choice((8, 16, 32))}, samples=20)))
    assert {t.config.batch_size for t in drawn} == {8, 16, 32}


def test_a_strategy_that_cannot_keep_the_budget_is_reported_and_the_rest_runs(tmp_path):
    path = tmp_path / "fair.toml"
    path.write_text(
        'base = { match = "memory", match-share = 0.5 }\n'
        '[grid]\nstrategy = ["caff", "fedavg", "fewer-examples"]\n'
    )
    refused = {t.config.strategy: t.refused for t in expand(read_sweep(path))}
    assert refused["caff"] == ""
    for strategy in ("fedavg", "fewer-examples"):
        assert "cannot keep a budget of memory" in refused[strategy]


@pytest.fixture
def unread():
    """Contents are read once a process; a test changes them meanwhile."""
    for read in (contents._file, contents._module, contents._listing):
        read.cache_clear()
    return lambda: [f.cache_clear() for f in (contents._file, contents._module, contents._listing)]


def test_other_budgets_in_a_file_of_the_same_name_are_another_trial(tmp_path, unread):
    path = tmp_path / "mine.toml"
    path.write_text('mix = ["a"]\n[classes.a]\nflops = "60 %"\n')
    config = RunConfig(budgets=str(path))
    first = Trial(config, {}).id
    assert Trial(config, {}).id == first
    path.write_text(path.read_text().replace("60", "40"))
    unread()
    assert Trial(config, {}).id != first


def test_another_plug_in_of_the_same_name_is_another_trial(tmp_path, monkeypatch, unread):
    folder = tmp_path / "some_plug_in"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text("A = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig(strategy="some_plug_in.one")
    first = Trial(config, {}).id
    (folder / "one.py").write_text("A = 2")
    unread()
    assert Trial(config, {}).id != first


def test_more_data_in_a_folder_is_another_trial(tmp_path, unread):
    config = RunConfig(dataset=str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"one")
    first = Trial(config, {}).id
    (tmp_path / "more.parquet").write_bytes(b"two")
    unread()
    assert Trial(config, {}).id != first


def test_what_comes_along_or_is_not_there_has_no_content():
    assert contents.contents(RunConfig()) == {}
    assert contents.contents(RunConfig(budgets="none.toml", strategy="not.there")) == {}
