"""Compiling in another process, and waiting for it."""

import os
import threading

import pytest

from d2ft_fl.planning import knapsack, solver_process
from d2ft_fl.util import compile_cache


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
    """An empty cache; what is asked of it is asked anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "wait_for", compile_cache.wait_for.__wrapped__)


def waiting(function):
    thread = threading.Thread(target=compile_cache.wait_for, args=(function,), daemon=True)
    thread.start()
    return thread


def test_one_process_compiles_and_is_given_up_at_the_end(nothing_compiled):
    assert not knapsack.is_compiled()
    with solver_process.compiling(coupled=False) as compiles:
        assert compiles
        assert compile_cache.try_lock() is None  # the process has it
        with solver_process.compiling(coupled=True) as again:
            assert not again
        thread = waiting("solve_all")
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()
    assert not knapsack.is_compiled()
    lock = compile_cache.try_lock()
    assert lock is not None
    os.close(lock)


def test_nobody_waits_for_what_is_compiled(nothing_compiled):
    compile_cache.can_cache()
    (compile_cache.folder() / "many.solve_all-15.py311.nbi").touch()
    lock = compile_cache.try_lock()
    try:
        compile_cache.wait_for("solve_all")
        with solver_process.compiling(coupled=False) as compiles:
            assert not compiles
        thread = waiting("spread_all")
        thread.join(0.2)
        assert thread.is_alive()
    finally:
        os.close(lock)
    thread.join(60)


def test_where_nothing_can_be_cached_everyone_compiles(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with solver_process.compiling(coupled=False) as compiles:
        assert not compiles
    compile_cache.wait_for.__wrapped__("solve_all")


@pytest.mark.parametrize("coupled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_the_process_runs_compiles_the_solver(nothing_compiled, monkeypatch, coupled):
    with solver_process.compiling(coupled):
        compile_cache.wait_for("spread_all" if coupled else "solve_all")
        assert knapsack.is_compiled(coupled)
        assert knapsack.is_compiled(True) == coupled
