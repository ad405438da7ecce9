"""Classes of devices: TOML files of named budgets, and how clients are spread over them.

``mix`` is a list of class names, dealt out in turn, or a table of shares. By shares, with class
``i`` having the share ``s_i`` and ``n_i`` of the first ``c`` clients, the next client gets, among
the classes that are owed one (``s_i (c + 1) > n_i``), the one that must have it soonest (least
``(n_i + 1) / s_i``; the first in the file where that ties). This is the scheduling of periodic
tasks on one processor by earliest pseudo-deadline, and keeps ``|n_i - s_i c| < 1`` for every class
after every client (Baruah, Cohen, Plaxton and Varvel, Proportionate progress, Algorithmica 15,
1996). Giving the client to the class that is owed most does not, with many unequal shares.
"""

import math
import tomllib
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2ft_fl.budgets.budget import CURVE, ENTRIES, MEMORY_OF, Budget, ClientDescription
from d2ft_fl.budgets.traces import Trace, parse_trace
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.toml import read_text
from d2ft_fl.util.toml_lines import Locator, error_line

BUILTIN = ("devices", "hardware")  # files of device classes among the assets
ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class InTurn:
    """Classes that clients get one after the other, over and over."""

    names: tuple[str, ...]

    def __call__(self, client: int) -> str:
        """Return the class of a client."""
        return self.names[client % len(self.names)]

    def share(self, name: str) -> float:
        """Return the share of clients that get a class."""
        return self.names.count(name) / len(self.names)


@dataclass(frozen=True)
class ByShare:
    """Classes by share: the first clients, however many, are within one of each class's share.

    Attributes:
        names: The classes.
        weights: Whole numbers in the ratio of the classes' shares.
    """

    names: tuple[str, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, shares: dict[str, float]) -> "ByShare":
        """Return the classes by positive shares of any sum, taken as the decimals as written."""
        exact = [Fraction(str(share)) for share in shares.values()]
        whole = [int(x * math.lcm(*(y.denominator for y in exact))) for x in exact]
        common = math.gcd(*whole)
        return cls(tuple(shares), tuple(weight // common for weight in whole))

    def __call__(self, client: int) -> str:
        """Return the class of a client."""
        client %= sum(self.weights)  # by then every class has exactly its share
        clients = 1 << max(10, client.bit_length())  # few lengths, so that most calls look up
        return self.names[deal(self.weights, clients)[client]]

    def share(self, name: str) -> float:
        """Return the share of clients that get a class."""
        return dict(zip(self.names, self.weights, strict=True)).get(name, 0) / sum(self.weights)


@lru_cache(maxsize=64)
def deal(weights: tuple[int, ...], clients: int) -> tuple[int, ...]:
    """Return the classes of the first clients, as positions in ``weights``.

    The rule is that of the module's docstring.
    """
    total, common = sum(weights), math.lcm(*weights)
    apart = [common // weight for weight in weights]
    given = [0] * len(weights)
    out = []
    for count in range(1, clients + 1):
        owed = (i for i, w in enumerate(weights) if w * count > given[i] * total)
        chosen = min(owed, key=lambda i: (given[i] + 1) * apart[i])
        given[chosen] += 1
        out.append(chosen)
    return tuple(out)


@dataclass(frozen=True)
class DeviceClass:
    """A device class: a budget, and how it varies."""

    budget: Budget
    trace: Trace | None = None

    def __call__(self, client: int, round_number: int) -> Budget:
        """Return the budget of a client of this class in a round."""
        return self.trace.apply(self.budget, client, round_number) if self.trace else self.budget


@dataclass(frozen=True)
class DeviceClasses:
    """A source of budgets: the device classes of a file."""

    classes: dict[str, DeviceClass]
    mix: InTurn | ByShare

    @property
    def varies(self) -> bool:
        """Whether any class has a trace."""
        return any(c.trace for c in self.classes.values())

    def __call__(self, client: ClientDescription, round_number: int) -> Budget:
        """Return the budget of a client's class."""
        return self.classes[self.mix(client.client)](client.client, round_number)

    def counts(self, clients: int) -> dict[str, int]:
        """Count how many of the first clients get each class."""
        names = [self.mix(client) for client in range(clients)]
        return {name: names.count(name) for name in self.classes}

    def to_json(self, clients: int) -> list[dict[str, Any]]:
        """Return a row for each class: its budget, its share, and how many first clients get it."""
        counts = self.counts(clients)
        return [
            {
                "class": name,
                "share": self.mix.share(name),
                "clients": counts[name],
                "trace": str(c.trace) if c.trace else None,
                "budget": c.budget.to_json(),
            }
            for name, c in self.classes.items()
        ]


def read_devices(path: Path) -> DeviceClasses:
    """Read device classes from a TOML file.

    Raises:
        ConfigError: When the file is missing, is not TOML, or has a wrong entry, with its line.
    """
    text = read_text(path, "budgets file")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}:{error_line(error, text)}: not TOML: {error}") from None
    at = Locator(path.name, text)
    if unknown := [name for name in table if name not in ("classes", "mix")]:
        raise ConfigError(
            f"{at(unknown[0])}: unknown table {unknown[0]!r}; allowed are classes, mix"
        )
    tables = table.get("classes")
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{at('classes')}: no device class; write a table [classes.NAME]")
    classes = {
        name: _device_class(name, entries, at, path.parent) for name, entries in tables.items()
    }
    return DeviceClasses(classes, _mix(table.get("mix", list(classes)), tuple(classes), at))


def named(source: str) -> DeviceClasses:
    """Return built-in device classes by name, or those of a file.

    Raises:
        ConfigError: When there is neither, or the file is wrong.
    """
    if source in BUILTIN:
        return read_devices(ASSETS / f"{source}.toml")
    if source.endswith(".toml"):
        return read_devices(Path(source).expanduser())
    raise ConfigError(
        f"budgets {source!r} are not device classes; use {', '.join(BUILTIN)}, or a path ending "
        "in .toml"
    )


def _device_class(name: str, table: Any, at: Locator, folder: Path) -> DeviceClass:
    if not isinstance(table, dict):
        raise ConfigError(
            f"{at('classes', name)}: classes.{name} is {table!r}; write a table [classes.{name}]"
        )
    entries: dict[str, Any] = {}
    trace = None
    for key, value in table.items():
        where = f"{at('classes', name, key)}: classes.{name}"
        entry = key.replace("_", "-")
        if entry == "trace":
            trace = parse_trace(value, where)
        elif entry not in ENTRIES:
            raise ConfigError(
                f"{where}: unknown entry {key!r}; allowed are {', '.join(ENTRIES)}, trace"
            )
        elif entry in entries:
            raise ConfigError(f"{where}: {entry} is given twice; write it once")
        else:
            if entry == CURVE and isinstance(value, str):
                value = str(folder / Path(value).expanduser())
            Budget.from_mapping({key: value}, where)  # so that an error names its line
            entries[entry] = value
    budget = Budget.from_mapping({**entries, "device": name})
    budget.check(f"{at('classes', name, _said_of_memory(table))}: classes.{name}")
    if budget.speed is None and budget.curve is not None:
        budget = replace(budget, speed=budget.curve.peak)
    rates = (budget.speed, budget.bandwidth_up, budget.bandwidth_down)
    if budget.deadline is not None and not any(rates):
        raise ConfigError(
            f"{at('classes', name, 'deadline')}: classes.{name}: deadline has no effect without a "
            'speed or a bandwidth; write one, such as speed = "10 GFLOP/s", or no deadline'
        )
    if trace is not None and all(getattr(budget, entry) is None for entry in trace.scales):
        raise ConfigError(
            f"{at('classes', name, 'trace')}: classes.{name}: trace has nothing to scale; write "
            f"one of {', '.join(trace.scales)}, or no trace"
        )
    return DeviceClass(budget, trace)


def _said_of_memory(table: dict[str, Any]) -> str:
    """Return the key of a class that says most of its memory."""
    said = [key for key in table if key.replace("_", "-") in ("memory-base", MEMORY_OF)]
    return said[-1] if said else "memory"


def _mix(mix: Any, classes: tuple[str, ...], at: Locator) -> InTurn | ByShare:
    known = ", ".join(classes)
    if isinstance(mix, dict) and mix:
        for name, share in mix.items():
            where = f"{at('mix', name)}: mix.{name} = {share!r}"
            if name not in classes:
                raise ConfigError(f"{where} is of an unknown class; use names among {known}")
            if type(share) not in (int, float) or not 0 < share < math.inf:
                raise ConfigError(f"{where} is no share; write a number above 0, like 0.6")
        return ByShare.of(mix)
    if not isinstance(mix, list) or not mix or any(name not in classes for name in mix):
        raise ConfigError(
            f"{at('mix')}: mix = {mix!r} must list names among {known}, or be a table [mix] of "
            "their shares"
        )
    return InTurn(tuple(mix))
