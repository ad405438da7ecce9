"""What a client can afford in one round, and where it says so.

A budget holds FLOPs, peak bytes of memory, bytes up and bytes down, each optional, each absolute
("2 GFLOP", "512 MiB") or relative ("40 %") to fully fine-tuning the same model on the client's own
data at the configured batch size. Its speed and bandwidth feed the simulated clock only.

A client finds its budget in a TOML file of device classes (the built-in one by default) or asks a
``module:callable`` of yours, given a :class:`ClientDescription` and the round.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.costs import RESOURCES, Cost
from d2ft_fl.errors import ConfigError
from d2ft_fl.plugins import load_attribute

BUILTIN = "devices"
UNLIMITED = 2**60
_NUMBER = re.compile(r"^\s*([+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([^\s0-9].*?)?\s*$")
_PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_FLOPS = {f"{p}FLOP{s}": f for p, f in _PREFIXES.items() for s in ("", "s")}
_BYTES = {f"{p}B": f for p, f in {**_PREFIXES, **_BINARY, "K": 1e3}.items()}
_SPEEDS = {f"{p}FLOP/s": f for p, f in _PREFIXES.items()}
_RATES = {f"{u}/s": f for u, f in _BYTES.items()} | {
    f"{p}bit/s": f / 8 for p, f in _PREFIXES.items()
}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "flops": (_FLOPS, '"2 GFLOP" or "40 %"'),
    "memory": (_BYTES, '"512 MiB" or "40 %"'),
    "bytes_up": (_BYTES, '"10 MB" or "40 %"'),
    "bytes_down": (_BYTES, '"10 MB" or "40 %"'),
    "speed": (_SPEEDS, '"10 GFLOP/s"'),
    "bandwidth_up": (_RATES, '"5 Mbit/s"'),
    "bandwidth_down": (_RATES, '"20 Mbit/s"'),
}


@dataclass(frozen=True)
class Amount:
    """An amount of a resource: absolute, or a share of fully fine-tuning."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite(self.value) or self.value < 0:
            raise ConfigError(f"a budget of {self.value} is negative or not finite")

    def resolve(self, full: int) -> int:
        """In FLOPs or bytes, rounded down; ``full`` is what 100 % means."""
        return int(self.value * full) if self.relative else int(self.value)


@dataclass(frozen=True)
class Budget:
    """What one client can afford in one round; ``None`` is no limit.

    Attributes:
        flops, memory, bytes_up, bytes_down: The four budgets.
        speed: FLOP/s. bandwidth_up, bandwidth_down: bytes/s. For the simulated clock; ``None``
            takes no time.
        device: A name to report.
    """

    flops: Amount | None = None
    memory: Amount | None = None
    bytes_up: Amount | None = None
    bytes_down: Amount | None = None
    speed: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None
    device: str = ""

    def capacity(self, full: Cost) -> np.ndarray:
        """The four budgets in ``RESOURCES`` order, ``UNLIMITED`` where there is none: int64 [4]."""
        amounts = [getattr(self, r) for r in RESOURCES]
        return np.array(
            [
                UNLIMITED if a is None else min(UNLIMITED, a.resolve(getattr(full, r)))
                for a, r in zip(amounts, RESOURCES, strict=True)
            ],
            dtype=np.int64,
        )

    def seconds(self, cost: Cost) -> float:
        """Simulated seconds of a round: download, compute, upload."""
        parts = (
            (cost.bytes_down, self.bandwidth_down),
            (cost.flops, self.speed),
            (cost.bytes_up, self.bandwidth_up),
        )
        return sum(amount / rate for amount, rate in parts if rate)

    def to_json(self) -> dict[str, Any]:
        """A form that :meth:`from_mapping` reads back exactly."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Amount):
                out[f.name] = {"share": value.value} if value.relative else value.value
            elif value not in (None, ""):
                out[f.name] = value
        return out

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str = "budget") -> "Budget":
        """A budget from a TOML table, a JSON object or what a plug-in returned.

        Raises:
            ConfigError: For an unknown, negative or unparsable entry, naming it.
        """
        values: dict[str, Any] = {}
        for key, value in entries.items():
            name = key.replace("-", "_")
            if name == "device":
                values[name] = str(value)
            elif name in _UNITS:
                values[name] = _parse(name, value, f"{where}: {key} = {value!r}")
            else:
                known = ", ".join(n.replace("_", "-") for n in _UNITS)
                raise ConfigError(f"{where}: unknown entry {key!r}; allowed are {known}")
        return cls(**values)


def _parse(name: str, value: Any, where: str) -> Amount | float:
    units, example = _UNITS[name]
    share = False
    if isinstance(value, Mapping) and type(value.get("share")) in (int, float):
        number, share = float(value["share"]), True
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _NUMBER.match(value)):
        unit = match[2] or ""
        if unit == "%":
            number, share = float(match[1]) / 100, True
        elif unit in units:
            number = float(match[1]) * units[unit]
        else:
            raise ConfigError(f"{where} has unit {unit!r}; write something like {example}")
    else:
        raise ConfigError(f"{where} cannot be read; write something like {example}")
    if not np.isfinite(number) or number < 0:
        raise ConfigError(f"{where} is negative or not finite; write something like {example}")
    if name in RESOURCES:
        return Amount(number, share)
    if share or number == 0:
        raise ConfigError(f"{where} must be an absolute rate above 0, like {example}")
    return number


@dataclass(frozen=True)
class ClientDescription:
    """What a budget source is told about a client."""

    client: int
    examples: int
    clients: int


BudgetSource = Callable[[ClientDescription, int], Budget]


@dataclass(frozen=True)
class DeviceClasses:
    """Named budgets, dealt out to clients in turn."""

    classes: dict[str, Budget]
    mix: tuple[str, ...]

    def __call__(self, client: ClientDescription, round: int) -> Budget:
        """The budget of a client's class, the same in every round."""
        return self.classes[self.mix[client.client % len(self.mix)]]


def read_devices(path: Path) -> DeviceClasses:
    """Read device classes from a TOML file.

    Raises:
        ConfigError: When the file is missing, is not TOML, or holds a wrong entry.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"budgets file {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"budgets file {str(path)!r} is not TOML: {error}") from None
    if unknown := sorted(table.keys() - {"classes", "mix"}):
        raise ConfigError(f"{path.name}: unknown table {unknown[0]!r}; allowed are classes, mix")
    tables = table.get("classes")
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{path.name}: no device class; write a table [classes.NAME]")
    classes = {}
    for name, entries in tables.items():
        where = f"{path.name}: classes.{name}"
        if not isinstance(entries, dict):
            raise ConfigError(f"{where} is {entries!r}; write a table [classes.{name}]")
        classes[name] = Budget.from_mapping({**entries, "device": name}, where)
    mix = table.get("mix", list(classes))
    if not isinstance(mix, list) or not mix or any(m not in list(classes) for m in mix):
        raise ConfigError(f"{path.name}: mix = {mix!r} must list names among {', '.join(classes)}")
    return DeviceClasses(classes, tuple(mix))


def budget_source(spec: str, resolve: Callable[[str], Path]) -> BudgetSource:
    """The source that a configuration names: ``devices``, a TOML file, or ``module:callable``.

    Raises:
        ConfigError: When there is none such.
    """
    if spec == BUILTIN:
        return read_devices(Path(__file__).parent / "assets" / "devices.toml")
    if spec.endswith(".toml"):
        return read_devices(resolve(spec))
    if ":" in spec:
        return _plugin(spec)
    raise ConfigError(
        f"budgets = {spec!r}; use 'devices', a path ending in .toml, or 'module:callable'"
    )


def varies_by_round(spec: str) -> bool:
    """Whether clients have to be asked again every round."""
    return ":" in spec and not spec.endswith(".toml")


def _plugin(spec: str) -> BudgetSource:
    function = load_attribute(spec, "budgets")
    if not callable(function):
        raise ConfigError(f"budgets = {spec!r} is a {type(function).__name__}, not a callable")

    def ask(client: ClientDescription, round: int) -> Budget:
        try:
            answer = function(client, round)
        except Exception as error:
            raise ConfigError(
                f"budgets = {spec!r} raised {type(error).__name__}: {error} "
                f"for client {client.client} in round {round}"
            ) from error
        where = f"budgets = {spec!r}"
        if isinstance(answer, Budget):  # read back, so that its entries are checked too
            return Budget.from_mapping(answer.to_json(), where)
        if isinstance(answer, Mapping):
            return Budget.from_mapping({str(k): v for k, v in answer.items()}, where)
        raise ConfigError(
            f"budgets = {spec!r} returned a {type(answer).__name__}; return a Budget or a mapping"
        )

    return ask
