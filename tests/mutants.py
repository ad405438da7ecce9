"""How many small faults in the mathematics the tests notice: draws mutants and runs tests on each.

    python tests/mutants.py --seed 1              300 mutants, evenly over the groups of modules
    python tests/mutants.py --seed 1 --group lora --count 20 --show

A mutant is one module with one thing changed: an arithmetic operator, a comparison, a boolean, a
constant by one, a statement left out, two arguments exchanged. Texts, annotations, assertions and
messages stay as they are. Each faces the tests that call the function it is in, those of its own
package first, then fastest first, as many as take half a minute; what is compiled otherwise runs as
Python when it is changed. A mutant is killed if a test fails, or if the tests do not end. In the
end each test that failed faces the unchanged code: where it fails there too, it has shown nothing,
and what it killed counts as survived. Mutants that change nothing that can be told are in
EQUIVALENT, with the reason; of what is drawn, those count as killed up to a twentieth.
"""

import argparse
import ast
import builtins
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mutant_sites import Sites, change

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Seconds of a processor, which depend less on what else a machine does.
SECONDS = 30.0  # of tests for each mutant
LONGEST = 8.0  # of one test
ENDLESS = 75  # after which tests do not end
ASLEEP = 600.0  # seconds after which they do not end, whatever they wait for
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
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        module: Its path below the package, without the ending.
        function: The qualified name of the function that the change is in; empty for none.
        line: Where.
        place: Which of the module's possible changes it is.
        statement: The first line of the statement that the change is in.
        before: The changed part as it was; ``after`` as it is.
    """

    module: str
    function: str
    line: int
    place: int
    statement: str
    before: str
    after: str

    def __str__(self) -> str:
        change = f"{self.before} -> {self.after}"
        where = f" in {self.statement}" if self.statement != self.before else ""
        return " ".join(f"{self.module}.py {self.function}: {change}{where}".split())


def source_of(module: str) -> Path:
    """Return the file of a module."""
    top = ROOT if module.startswith("clients/") else ROOT / "d2ft_fl"
    return top / f"{module}.py"


def name_of(module: str) -> str:
    """Return the dotted name under which a module is imported."""
    return "d2ft_fl." + module.replace("/", ".")


def changed(module: str, place: int) -> tuple[ast.Module, Mutant]:
    """Return a module's syntax tree with one change, and what it is."""
    tree = ast.parse(source_of(module).read_text())
    sites = Sites()
    sites.visit(tree)
    function, statement, node, how = sites.found[place]
    before, line = ast.unparse(node), ast.unparse(statement).split("\n")[0]
    new = change(copy.deepcopy(node), how)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(part is node for part in value):
                setattr(parent, name, [new if part is node else part for part in value])
    after = "nothing" if how == "remove" else ast.unparse(new)
    found = Mutant(module, function, node.lineno, place, line, before, after)
    return ast.fix_missing_locations(tree), found


def drawn(seed: int, count: int, groups: list[str]) -> list[tuple[str, Mutant]]:
    """Draw mutants by a seed, as many of each group as of every other."""
    out = []
    for number, group in enumerate(groups):
        share = count // len(groups) + (number < count % len(groups))
        places = []
        for module in GROUPS[group]:
            sites = Sites()
            sites.visit(ast.parse(source_of(module).read_text()))
            places += [(module, place) for place in range(len(sites.found))]
        draw = random.Random(f"{seed} {group}")
        for module, place in draw.sample(places, min(share, len(places))):
            out.append((group, changed(module, place)[1]))
    return out


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
            _quiet()
            names = Names()
            _pytest([*tests, "--collect-only"], [names])
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
        _quiet(Path(f"{path}.log"))
        _as_python(modules[0])
        trace = Trace(modules)
        # Tests that are too slow here fail (1); anything else means that not all were run.
        ended = _pytest([*tests, "-m", "not slow and not cuda"], [trace]) in (0, 1)
        path.write_text(json.dumps(trace.tests))
    finally:
        os._exit(not ended)


def _as_python(module: str) -> None:
    """Have compiled code run as Python, if that is where the module is; before it is imported."""
    os.environ["NUMBA_DISABLE_JIT"] = str(int(module in COMPILED))


def _quiet(log: str | Path = os.devnull) -> None:
    file = os.open(log, os.O_RDWR | os.O_CREAT)
    for handle in (1, 2):
        os.dup2(file, handle)


def _pytest(arguments: list[str], plugins: list) -> int:
    os.chdir(ROOT)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--hypothesis-seed=0",
        "--tb=native",
    ]
    return int(pytest.main([*options, *arguments], plugins=plugins))


def tests_of(mutant: Mutant, tests: list[dict]) -> list[str]:
    """Return the tests that face a mutant, fastest first, as many as there is time for."""
    called = tests[0 if mutant.module in COMPILED else 1]
    name, package = f"{mutant.module}:{mutant.function}", mutant.module.rpartition("/")[0]
    calls = {test: seconds for test, (seconds, functions) in called.items() if name in functions}
    # Code of a class or module is run when it is imported; a module may have no function to call.
    for part in (f"{mutant.module}:", f"{package}/"):
        if not calls:
            calls = {t: s for t, (s, fs) in called.items() if any(f.startswith(part) for f in fs)}
    own = f"tests/{package}/"
    chosen, total = [], 2.0  # of imports
    for test in sorted(calls, key=lambda test: (not test.startswith(own), calls[test], test)):
        total += calls[test] + 0.02
        if total < SECONDS:
            chosen.append(test)
    return chosen


class Failures:
    """A plugin of pytest that keeps the names of tests that fail, and of files that do."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        """Keep one."""
        if report.failed:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")

    pytest_collectreport = pytest_runtest_logreport


def start(module: str, tree: ast.Module | None, tests: list[str], failed: Path) -> int:
    """Run tests on a module in a process of its own, which ends as pytest does.

    Args:
        module: The module.
        tree: What it is changed to, and then the tests end with the first that fails; or None.
        tests: Names of tests.
        failed: Where the names of those that fail are kept.
    """
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    _quiet()
    _as_python(module)
    if tree:
        sys.meta_path.insert(0, Finder({module: tree}))
        resource.setrlimit(resource.RLIMIT_CPU, (ENDLESS, ENDLESS))
    code = 3
    try:
        code = _pytest([*(["-x"] if tree else []), *tests], [Failures(failed)])
    finally:
        os._exit(code)


def outcome_of(code: int, failed: bool) -> str:
    """Return what became of a mutant.

    Args:
        code: How its tests ended: a status of pytest, or less a signal.
        failed: Whether any of them failed, or could not be imported.
    """
    if code == 0:
        return "survived"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "endless"
    return "killed" if failed or code < 0 else "untested"


def face(
    mutants: list[tuple[str, Mutant]], tests: list[dict], jobs: int, show: bool, folder: Path
) -> Counter:
    """Have each mutant face its tests; return (group, outcome) -> how many."""
    known = equivalent()
    counts: Counter = Counter()
    waiting, running, killers = list(enumerate(mutants)), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, (group, mutant) = waiting.pop(0)
            chosen = tests_of(mutant, tests)
            if chosen:
                tree, failed = changed(mutant.module, mutant.place)[0], folder / f"{number}.failed"
                child = start(mutant.module, tree, chosen, failed)
                running[child] = group, mutant, failed, time.monotonic()
            else:
                _note(counts, group, mutant, "untested", known, show)
        time.sleep(0.05)
        for child, (group, mutant, failed, began) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() - began < ASLEEP:
                continue
            if not ended:
                os.killpg(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            del running[child]
            names = failed.read_text().split("\n") if failed.is_file() else []
            outcome = outcome_of(os.waitstatus_to_exitcode(status), bool(names))
            _note(counts, group, mutant, outcome, known, show)
            if outcome == "killed" and names and "::" in names[0]:
                test = mutant.module in COMPILED, names[0]
                killers.setdefault(test, []).append((group, mutant))
    for compiled, name in failing(list(killers), folder):
        print(f"{name} fails on the unchanged code as well", flush=True)
        for group, mutant in killers[compiled, name]:
            counts[group, "killed"] -= 1
            counts[group, "survived"] += 1
            print(f"     survived  line {mutant.line} of {mutant}", flush=True)
    return counts


def failing(tests: list[tuple[bool, str]], folder: Path) -> list[tuple[bool, str]]:
    """Return those (of compiled code, name) of tests that fail on the unchanged code."""
    out = []
    for compiled in (True, False):
        names = [name for of_compiled, name in tests if of_compiled == compiled]
        module, failed = (COMPILED if compiled else GROUPS["costs"])[0], folder / f"{compiled}.own"
        if names:
            status = os.waitpid(start(module, None, names, failed), 0)[1]
            if os.waitstatus_to_exitcode(status) not in (0, 1):
                raise SystemExit("pytest stopped before the last test")
        if failed.is_file():
            out += [(compiled, name) for name in dict.fromkeys(failed.read_text().split("\n")[:-1])]
    return out


def _note(counts, group, mutant, outcome, known, show) -> None:
    if outcome in ("survived", "untested") and str(mutant) in known:
        outcome = "equivalent"
    counts[group, outcome] += 1
    if show or outcome in ("survived", "untested"):
        number = counts.total()
        print(f"{number:>4} {outcome:>10}  line {mutant.line} of {mutant}", flush=True)
    elif counts.total() % 20 == 0:
        print(f"{counts.total():>4} mutants have faced their tests", flush=True)


def equivalent() -> set[str]:
    """Return the mutants that change nothing that can be told; a line each, then its reason."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.is_file() else []
    return {line for line in lines if line and not line.startswith(("#", " "))}


def main() -> int:
    """Draw, run, print a table; 1 if fewer than nine of ten are killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--group", action="append", choices=sorted(GROUPS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--map", type=Path, help="where to keep which test calls what")
    parser.add_argument("--tests", action="append", default=[], help="only these files or folders")
    parser.add_argument("--show", action="store_true", help="print those that are killed, too")
    asked = parser.parse_args()
    import hypothesis  # noqa: F401 - imported once, for all mutants
    import timm  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="d2ft-mutants-") as folder:
        tests = called_by_tests(asked.map or Path(folder, "map.json"), asked.tests)
        groups = asked.group or list(GROUPS)
        mutants = drawn(asked.seed, asked.count, groups)
        counts = face(mutants, tests, asked.jobs, asked.show, Path(folder))
    outcomes = ("killed", "endless", "equivalent", "survived", "untested")
    print(f"{'':>12}" + "".join(f"{outcome:>12}" for outcome in outcomes))
    for group in (*groups, "all"):
        row = [sum(n for (g, o), n in counts.items() if o == outcome and group in (g, "all"))
               for outcome in outcomes]  # fmt: skip
        print(f"{group:>12}" + "".join(f"{n:>12}" for n in row))
    total = sum(counts.values())
    dead = sum(n for (_, outcome), n in counts.items() if outcome in ("killed", "endless"))
    same = sum(n for (_, outcome), n in counts.items() if outcome == "equivalent")
    share = (dead + min(same, total // 20)) / total
    print(f"{share:.1%} of {total} killed (seed {asked.seed})")
    return int(share < 0.9)


if __name__ == "__main__":
    sys.exit(main())
