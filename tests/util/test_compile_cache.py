"""Compiled code is cached by what all of its sources say."""

import ast
import shutil

import pytest
from numba import njit
from numba.core.codegen import JITCodeLibrary

from d2ft_fl.util import compile_cache, compiled

COMPILED = "d2ft_fl.util.compiled"


def sources(package):
    return {file for pattern in compile_cache.SOURCES for file in package.glob(pattern)}


def imports_compiled(file):
    """Whether a module imports :mod:`d2ft_fl.util.compiled`, in any way of writing it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        if COMPILED in names:
            return True
    return False


def test_every_module_with_compiled_functions_is_a_source():
    modules = {file for file in compile_cache.PACKAGE.rglob("*.py") if imports_compiled(file)}
    assert len(modules) >= 7
    assert modules <= sources(compile_cache.PACKAGE)
    assert compile_cache.PACKAGE / "util" / "compiled.py" in sources(compile_cache.PACKAGE)


def test_every_pattern_of_sources_matches_something():
    for pattern in compile_cache.SOURCES:
        assert list(compile_cache.PACKAGE.glob(pattern)), pattern


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """A copy of the sources in place of the package; its stamp is worked out anew each time."""
    for file in sources(compile_cache.PACKAGE):
        place = tmp_path / file.relative_to(compile_cache.PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    monkeypatch.setattr(compile_cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(compile_cache, "stamp", compile_cache.stamp.__wrapped__)
    return tmp_path


def test_the_stamp_changes_with_any_source_and_with_nothing_else(copied):
    before = compile_cache.stamp()
    for file in sorted(sources(copied)):
        text = file.read_text()
        file.write_text(text + "\n")
        assert compile_cache.stamp() != before, file
        file.write_text(text)
    copied.joinpath("planning", "planner.py").write_text("changed")
    assert compile_cache.stamp() == before


def test_a_function_is_compiled_where_its_index_lies(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compile_cache.can_cache()
    assert not compile_cache.is_compiled("solve_all")
    compile_cache.folder().joinpath("many.solve_all-15.py311.nbi").touch()
    assert compile_cache.is_compiled("solve_all")
    assert not compile_cache.is_compiled("solve")
    many = copied / "planning" / "solver" / "many.py"
    many.write_text(many.read_text() + "\n")
    assert not compile_cache.is_compiled("solve_all")


def test_parts_are_compiled_once_whatever_constants_they_are_called_with():
    """numba compiles a function anew for each constant, and so all that it calls."""

    @compiled.inner
    def plus(a, b):
        return a + b

    @compiled.inner
    def thrice(a, b):
        return plus(a, 1) + plus(b, -1) + plus(2, b)

    @njit
    def outer(a):
        return thrice(a, 7)

    assert outer(5) == 5 + 1 + 7 - 1 + 2 + 7
    assert len(plus.signatures) == len(thrice.signatures) == 1


def test_machine_code_is_generated_for_entries_alone(monkeypatch):
    generated = []
    finalize = JITCodeLibrary._finalize_specific
    monkeypatch.setattr(
        JITCodeLibrary,
        "_finalize_specific",
        lambda library: (generated.append(library.name), finalize(library)),
    )

    @compiled.inner
    def part(a):
        return a + 1

    @njit
    def outer(a):
        return part(a)

    assert outer(1) == 2
    names = [name.split(".")[-1] for name in generated]
    assert "outer" in names
    assert "part" not in names
