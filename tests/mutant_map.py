"""Which tests call the functions in which tests/mutants.py makes faults, and how they are run."""

import ast
import builtins
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Seconds of a processor, which depend less on what else a machine does.
SECONDS = 30.0  # of tests for each mutant
LONGEST = 8.0  # of one test
GROUPS = {
    "costs": ["costs/flops", "costs/communication", "costs/probe_costs", "costs/seconds",
              "costs/cost_model", "costs/parameter_counts", "costs/resources"],
    "memory": ["costs/memory", "costs/round_memory", "costs/activations"],
    "knapsack": ["planning/knapsack", "planning/problem", "planning/client_knapsacks",
                 "planning/planner", "planning/pricing", "planning/cost_tables",
                 "planning/objective", "planning/utility"],
    "aggregation": ["aggregation/sums", "aggregation/update", "aggregation/robust",
                    "aggregation/hostile", "aggregation/mean_compensation",
                    "aggregation/server_optimizer", "aggregation/fixed_point"],
    "lora": ["aggregation/lora_sums", "lora/config", "lora/init", "lora/peft_export",
             "lora/peft_import", "clients/lora"],
    "training": ["engine/trainer", "engine/grouping", "engine/numerics", "client/trainer",
                 "client/examples", "tasks/image_classification", "tasks/task",
                 "config/training_options", "config/choices"],
    "coding": ["wire/quantization", "wire/blob", "wire/sizes", "wire/parameter_cache",
               "rounds/messages"],
    "privacy": ["aggregation/privacy", "aggregation/private_sums", "aggregation/keyed_noise",
                "aggregation/releases", "aggregation/grid"],
    "solver": ["planning/solver/choices", "planning/solver/exact", "planning/solver/feasible",
               "planning/solver/instance", "planning/solver/many", "planning/solver/moves",
               "planning/solver/prices", "planning/solver/search"],
}  # fmt: skip
COMPILED = (*GROUPS["solver"], "aggregation/fixed_point")  # by numba
TESTS = ("tests/costs", "tests/planning", "tests/aggregation", "tests/lora", "tests/clients",
         "tests/engine", "tests/client", "tests/tasks", "tests/wire", "tests/rounds",
         "tests/config", "tests/strategies", "tests/subnets")  # fmt: skip


def source_of(module: str) -> Path:
    """Return the file of a module."""
    top = ROOT if module.startswith("clients/") else ROOT / "d2ft_fl"
    return top / f"{module}.py"


def name_of(module: str) -> str:
    """Return the dotted name under which a module is imported."""
    return "d2ft_fl." + module.replace("/", ".")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Has modules be imported from other syntax trees than their files'."""

    def __init__(self, trees: dict[str, ast.Module]):
        self.modules = {name_of(module): module for module in trees}
        self.trees = trees

    def find_spec(self, name, path, target=None):
        """Find those modules only."""
        if name not in self.modules:
            return None
        file = source_of(self.modules[name])
        return importlib.util.spec_from_file_location(name, file, loader=self)

    def exec_module(self, module):
        """Run the other code in it."""
        name = self.modules[module.__name__]
        exec(compile(self.trees[name], str(source_of(name)), "exec"), module.__dict__)


class Noting(ast.NodeTransformer):
    """Has every function of a module note that it is called: as module:function in ``seen``."""

    def __init__(self, module: str):
        self.scope = [module + ":"]

    def _inside(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef):
            name = self.scope[0] + ".".join(self.scope[1:])
            after = ast.get_docstring(node) is not None
            node.body[after:after] = ast.parse(f"d2ft_functions_called.add({name!r})").body
        self.scope.pop()
        return node

    visit_ClassDef = visit_FunctionDef = _inside


class Trace:
    """A plugin of pytest that notes which functions each test calls, and how long it takes."""

    def __init__(self, modules: list[str]):
        trees = {m: Noting(m).visit(ast.parse(source_of(m).read_text())) for m in modules}
        sys.meta_path.insert(0, Finder({m: ast.fix_missing_locations(t) for m, t in trees.items()}))
        self.tests, self.seen = {}, set()
        builtins.d2ft_functions_called = self.seen

    def pytest_runtest_logreport(self, report):
        """Note a test that passed."""
        if report.when == "call" and report.passed:
            seconds = round(_processor_seconds() - self.began, 3)
            self.tests[report.nodeid] = [seconds, sorted(self.seen)]

    def pytest_runtest_setup(self, item):
        """Begin with a test."""
        self.seen.clear()
        self.began = _processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Stop a test that takes too long, while pytest takes what is raised for its failure."""
        signal.signal(signal.SIGPROF, _too_long)
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _processor_seconds() -> float:
    return sum(os.times()[:4])  # children's too


def _too_long(number, frame):
    raise TimeoutError("the test takes too long")


def called_by_tests(path: Path, only: Sequence[str]) -> list[dict]:
    """Return test -> seconds, functions, of what is compiled and of all else.

    Args:
        path: Where that is, or will be kept.
        only: The files and folders of tests to look at; empty for all that may matter.
    """
    if path.is_file():
        tests = json.loads(path.read_text())
        if unknown := set().union(*tests) - collected(only or TESTS, path.with_suffix(".names")):
            raise SystemExit(f"{path} has tests that are gone, {min(unknown)} first; delete it")
        return tests
    print("noting which test calls what, once: some minutes", flush=True)
    others = [module for group in GROUPS.values() for module in group if module not in COMPILED]
    plain, rest = path.with_suffix(".plain"), path.with_suffix(".rest")
    near = ("tests/planning", "tests/aggregation")
    children = _trace(others, only or TESTS, rest), _trace(COMPILED, only or near, plain)
    ends = [os.waitpid(child, 0)[1] for child in children]
    if any(ends):
        raise SystemExit("pytest stopped before the last test")
    path.write_text(f"[{plain.read_text()}, {rest.read_text()}]")
    return json.loads(path.read_text())


class Names:
    """A plugin of pytest that keeps the names of tests that are found."""

    def pytest_collection_finish(self, session):
        """Keep them."""
        self.names = [item.nodeid for item in session.items]


def collected(tests: Sequence[str], path: Path) -> set[str]:
    """Return the names of tests, found in a process of its own that writes them to ``path``."""
    child = os.fork()
    if not child:
        try:
            quiet()
            names = Names()
            run_pytest([*tests, "--collect-only"], [names])
            path.write_text(json.dumps(names.names))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return set(json.loads(path.read_text()))


def _trace(modules: Sequence[str], tests: Sequence[str], path: Path) -> int:
    child = os.fork()
    if child:
        return child
    ended = False
    try:
        quiet(Path(f"{path}.log"))
        as_python(modules[0])
        trace = Trace(modules)
        # Tests that are too slow here fail (1); anything else means that not all were run.
        ended = run_pytest([*tests, "-m", "not slow and not cuda"], [trace]) in (0, 1)
        path.write_text(json.dumps(trace.tests))
    finally:
        os._exit(not ended)


def as_python(module: str) -> None:
    """Have compiled code run as Python, if that is where the module is; before it is imported."""
    os.environ["NUMBA_DISABLE_JIT"] = str(int(module in COMPILED))


def quiet(log: str | Path = os.devnull) -> None:
    """Have this process print to a file."""
    file = os.open(log, os.O_RDWR | os.O_CREAT)
    for handle in (1, 2):
        os.dup2(file, handle)


def run_pytest(arguments: list[str], plugins: list) -> int:
    """Run tests in this process, and return pytest's status."""
    os.chdir(ROOT)
    own = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "--tb=native"]
    return int(pytest.main([*own, *arguments], plugins=plugins))


def tests_of(module: str, function: str, tests: list[dict]) -> list[str]:
    """Return tests that call a function, fastest first, as many as there is time for.

    Args:
        module: Where it is.
        function: Its qualified name; empty for what is in none.
        tests: What :func:`called_by_tests` returns.
    """
    called = tests[0 if module in COMPILED else 1]
    name, package = f"{module}:{function}", module.rpartition("/")[0]
    calls = {test: seconds for test, (seconds, functions) in called.items() if name in functions}
    # Code of a class or module is run when it is imported; a module may have no function to call.
    for part in (f"{module}:", f"{package}/"):
        if not calls:
            calls = {t: s for t, (s, fs) in called.items() if any(f.startswith(part) for f in fs)}
    own = f"tests/{package}/"
    chosen, total = [], 2.0  # of imports
    for test in sorted(calls, key=lambda test: (not test.startswith(own), calls[test], test)):
        total += calls[test] + 0.02
        if total < SECONDS:
            chosen.append(test)
    return chosen
