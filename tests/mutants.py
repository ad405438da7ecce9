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
import copy
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mutant_map import (
    COMPILED,
    GROUPS,
    Finder,
    as_python,
    called_by_tests,
    quiet,
    run_pytest,
    source_of,
    tests_of,
)
from tests.mutant_sites import Sites, change

os.environ.setdefault("OMP_NUM_THREADS", "1")
ENDLESS = 75  # seconds of a processor after which tests do not end
ASLEEP = 600.0  # seconds after which they do not end, whatever they wait for
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
    quiet()
    as_python(module)
    if tree:
        sys.meta_path.insert(0, Finder({module: tree}))
        resource.setrlimit(resource.RLIMIT_CPU, (ENDLESS, ENDLESS))
    code = 3
    try:
        code = run_pytest([*(["-x"] if tree else []), *tests], [Failures(failed)])
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
            chosen = tests_of(mutant.module, mutant.function, tests)
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
