"""Memory of a process: what it takes beside tensors comes off, on devices and where it is said."""

import pytest

from d2ft_fl.budgets.budget import UNLIMITED, Amount, Budget, ClientDescription
from d2ft_fl.budgets.device_classes import named, read_devices
from d2ft_fl.budgets.matching import matched
from d2ft_fl.budgets.process_memory import (
    FIRST_STEP,
    keep_worker_memory,
    kept_worker_memory,
    told,
)
from d2ft_fl.budgets.sources import Plugin
from d2ft_fl.costs.resources import Cost
from d2ft_fl.errors import ConfigError

FULL = Cost(100, 10 * 2**30, 100, 100)
MIB = 2**20
WHO = ClientDescription(0, 10, 1)


def memory_of(**entries):
    """What is left for tensors."""
    return int(Budget.from_mapping(entries).capacity(FULL)[1])


def test_what_the_process_takes_comes_off_its_memory_and_nothing_off_tensors():
    assert memory_of(memory="1 GiB") == 1024 * MIB
    assert memory_of(memory="1 GiB", memory_of="tensors") == 1024 * MIB
    assert memory_of(memory="1 GiB", memory_of="process", memory_base="448 MiB") == 576 * MIB
    assert memory_of(memory="1 GiB", memory_of="process", memory_base="2 GiB") == 0
    assert memory_of(memory="50 %") == 5 * 1024 * MIB
    assert memory_of() == UNLIMITED


def test_on_a_device_an_amount_is_the_process_s_and_a_share_is_of_tensors():
    taken = 400 * MIB
    plain = Budget.from_mapping({"memory": "1 GiB"})
    assert plain.on("cpu", taken).capacity(FULL)[1] == 624 * MIB
    assert plain.on("cpu", None) == plain  # a simulation, as it always was
    assert plain.on("cuda", taken) == plain  # tensors alone are in a GPU's memory
    for same in ({"memory": "40 %"}, {"memory": "1 GiB", "memory-of": "tensors"}, {}):
        budget = Budget.from_mapping(same)
        assert budget.on("cpu", taken) == budget
    # What is said to be taken counts where it is more than what is.
    said = {"memory": "1 GiB", "memory-of": "process", "memory-base": "500 MiB"}
    assert Budget.from_mapping(said).on("cpu", taken).capacity(FULL)[1] == 524 * MIB
    assert Budget.from_mapping(said).on("cpu", 600 * MIB).capacity(FULL)[1] == 424 * MIB
    assert Budget.from_mapping(said).on("cuda", None).capacity(FULL)[1] == 524 * MIB


def test_what_nobody_measured_is_refused():
    unknown = Budget.from_mapping({"memory": "1 GiB", "memory-of": "process", "device": "phone"})
    with pytest.raises(ConfigError, match="phone: memory-of = 'process' needs memory-base"):
        unknown.on("cpu", None)
    assert unknown.on("cpu", 24 * MIB).capacity(FULL)[1] == 1000 * MIB
    with pytest.raises(ConfigError, match="is of a CPU's memory, and device = 'cuda'"):
        unknown.on("cuda", 24 * MIB)


def test_a_budget_of_a_process_survives_writing():
    budget = Budget(memory=Amount(2.0**30), memory_of="process", memory_base=448.0 * MIB)
    assert Budget.from_mapping(budget.to_json()) == budget
    assert "memory_of" not in Budget(memory=Amount(5.0)).to_json()


@pytest.mark.parametrize(
    "lines,message",
    [
        (["memory-of = 'process'"], "memory-of is of an amount of memory, and there is none"),
        (["memory-base = '1 MiB'"], "memory-base is of an amount of memory, and there is none"),
        (["memory = '40 %'", "memory-of = 'process'"], "a share is of tensors"),
        (["memory = '1 GiB'", "memory-base = '1 MiB'"], "write memory-of = 'process' too"),
        (
            ["memory = '1 GiB'", "memory-of = 'tensors'", "memory-base = '1 MiB'"],
            "write memory-of = 'process' too",
        ),
        (
            ["memory = '1 MiB'", "memory-of = 'process'", "memory-base = '1 MiB'"],
            "leaves nothing beside memory-base",
        ),
        (["memory = '1 GiB'", "memory-of = 'all'"], "memory-of = 'all' is unknown; use 'tensors'"),
        (["memory = '1 GiB'", "memory-base = '40 %'"], "must be absolute and above 0"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_line(tmp_path, lines, message):
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(["[classes.a]", *lines]))
    with pytest.raises(ConfigError) as raised:
        read_devices(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"mine.toml:{len(lines) + 1}: classes.a")
    assert "\n" not in str(raised.value)


def test_a_function_s_answer_is_checked_too():
    def answer(client, round_number):
        return {"memory": "40 %", "memory-of": "process"}

    with pytest.raises(ConfigError, match="budgets = 'a:b': memory-of is of an amount"):
        Plugin("a:b", answer)(WHO, 1)


def test_a_share_of_tensors_may_be_said_to_be_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[classes.a]\nmemory = '40 %'\nmemory-of = 'tensors'\n")
    assert read_devices(path)(WHO, 1).capacity(FULL)[1] == 4 * 1024 * MIB


def test_matching_compares_what_is_left_for_tensors():
    budgets = [
        Budget.from_mapping({"memory": 1000, "memory-of": "process", "memory-base": 500}),
        Budget.from_mapping({"memory": 250}),
    ]
    full = [Cost(1, 1000, 1, 1)] * 2
    found = matched("memory", 0.6, budgets, full)  # shares 0.5 and 0.25, times 1.6
    assert [b.memory.value for b in found] == pytest.approx([0.8, 0.4])
    assert [b.capacity(full[0])[1] for b in found] == pytest.approx([800, 400], abs=1)


def test_a_trace_lowers_a_process_s_memory_not_what_it_takes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[classes.a]\nmemory = '1000 MiB'\nmemory-of = 'process'\nmemory-base = '300 MiB'\n"
        "trace = 'load'\n"
    )
    source = read_devices(path)
    memory = [source(WHO, r).capacity(FULL)[1] / MIB for r in range(1, 25)]
    assert max(memory) == pytest.approx(700)  # at night, all of it
    assert min(memory) == pytest.approx(100)  # at noon 400, of which 300 are taken


def test_real_hardware_is_of_processes():
    for device in named("hardware").classes.values():
        budget = device.budget
        left = budget.capacity(Cost(1, 2**60, 1, 1))[1]
        assert left == budget.memory.value - 448 * MIB
        assert budget.on("cpu", None) == budget


def test_what_is_told_has_room_for_the_first_step_and_for_other_processes():
    assert told(400 * MIB) == 528 * MIB
    assert told(400 * MIB + 1) == 544 * MIB
    assert all(told(n) - n >= FIRST_STEP for n in range(0, 2**28, 7_777_777))


def test_what_a_worker_takes_is_kept_for_this_software(tmp_path, monkeypatch):
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path))
    assert kept_worker_memory() is None
    keep_worker_memory(123)
    assert kept_worker_memory() == 123
    (tmp_path / "worker-memory.json").write_text('{"software": "other", "bytes": 5}')
    assert kept_worker_memory() is None
    (tmp_path / "worker-memory.json").write_text("{")
    assert kept_worker_memory() is None
