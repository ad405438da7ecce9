"""What a client can afford in one round, and where it says so.

A budget holds FLOPs, peak bytes of memory, bytes up and bytes down, each optional, each absolute
("2 GFLOP", "512 MiB") or relative ("40 %") to training everything, as the run tunes it, on the
client's own data at the configured batch size; and a deadline, the most simulated seconds that a
round may take it by its speed and bandwidths.

Where budgets come from: a TOML file of device classes (``devices.py``; two are built in), this
machine's own measurement (``profile.py``), or a ``module:callable`` of yours, given a
:class:`ClientDescription` and the round.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2ft_fl.costs import RESOURCES, Cost
from d2ft_fl.errors import ConfigError
from d2ft_fl.plugins import load_attribute

DEADLINE = "deadline"
LIMITS = (*RESOURCES, DEADLINE)  # what a budget may limit
BUILTIN = ("devices", "hardware")  # files of device classes among the assets
MEASURED = "measured"
ASSETS = Path(__file__).parent / "assets"
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
_SECONDS = {"s": 1, "ms": 1e-3, "min": 60, "h": 3600}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "flops": (_FLOPS, '"2 GFLOP" or "40 %"'),
    "memory": (_BYTES, '"512 MiB" or "40 %"'),
    "bytes_up": (_BYTES, '"10 MB" or "40 %"'),
    "bytes_down": (_BYTES, '"10 MB" or "40 %"'),
    "speed": (_SPEEDS, '"10 GFLOP/s"'),
    "bandwidth_up": (_RATES, '"5 Mbit/s"'),
    "bandwidth_down": (_RATES, '"20 Mbit/s"'),
    "deadline": (_SECONDS, '"30 s" or "2 min"'),
}
ENTRIES = tuple(name.replace("_", "-") for name in _UNITS)


@dataclass(frozen=True)
class Amount:
    """An amount of a resource: absolute, or a share of training everything."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite(self.value) or self.value < 0:
            raise ConfigError(f"a budget of {self.value} is negative or not finite")

    def resolve(self, full: int) -> int:
        """In FLOPs or bytes, rounded down; ``full`` is what 100 % means."""
        wanted = self.value * full if self.relative else self.value
        return int(min(float(UNLIMITED), wanted))


@dataclass(frozen=True)
class Budget:
    """What one client can afford in one round; ``None`` is no limit.

    Attributes:
        flops, memory, bytes_up, bytes_down: The four budgets.
        speed: FLOP/s. bandwidth_up, bandwidth_down: bytes/s. ``None`` takes no time.
        deadline: The most simulated :meth:`seconds` of a round.
        device: A name to report.
    """

    flops: Amount | None = None
    memory: Amount | None = None
    bytes_up: Amount | None = None
    bytes_down: Amount | None = None
    speed: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None
    deadline: float | None = None
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
            if name in values:
                raise ConfigError(f"{where}: {key} is given twice; write it once")
            if name == "device":
                values[name] = str(value)
            elif name in _UNITS:
                values[name] = _parse(name, value, f"{where}: {key} = {value!r}")
            else:
                raise ConfigError(
                    f"{where}: unknown entry {key!r}; allowed are {', '.join(ENTRIES)}"
                )
        return cls(**values)


def _parse(name: str, value: Any, where: str) -> Amount | float:
    units, example = _UNITS[name]
    share = False
    if isinstance(value, Mapping) and type(value.get("share")) in (int, float):
        number, share = _float(value["share"]), True
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _float(value)
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
        raise ConfigError(f"{where} must be absolute and above 0, like {example}")
    return number


def _float(number: int | float) -> float:
    """As a float; infinite where TOML's whole numbers are too large for one."""
    try:
        return float(number)
    except OverflowError:
        return float("inf")


@dataclass(frozen=True)
class ClientDescription:
    """What a budget source is told about a client."""

    client: int
    examples: int
    clients: int


class BudgetSource(Protocol):
    """Says what a client can afford in a round."""

    @property
    def varies(self) -> bool:
        """Whether clients have to be asked again every round."""

    def __call__(self, client: ClientDescription, round: int) -> Budget:
        """The budget of ``client`` in ``round``, counted from 1."""


def budget_source(
    spec: str, resolve: Callable[[str], Path], device: str = "cpu", threads: int = 1
) -> BudgetSource:
    """The source that a configuration names.

    Args:
        spec: ``devices``, ``hardware``, ``measured``, a path ending in ``.toml``, or
            ``module:callable``.
        resolve: Makes a path absolute.
        device: Where ``measured`` measures: cpu or cuda.
        threads: Threads of torch that ``measured`` measures with.

    Raises:
        ConfigError: When there is none such, or its file is wrong.
    """
    from d2ft_fl import devices, profile  # both build on Budget

    if spec in BUILTIN:
        return devices.read_devices(ASSETS / f"{spec}.toml")
    if spec == MEASURED:
        return profile.Measured(device, threads)
    if spec.endswith(".toml"):
        return devices.read_devices(resolve(spec))
    if ":" in spec:
        function = load_attribute(spec, "budgets")
        if not callable(function):
            raise ConfigError(f"budgets = {spec!r} is a {type(function).__name__}, not a callable")
        return Plugin(spec, function)
    raise ConfigError(
        f"budgets = {spec!r}; use {', '.join(map(repr, (*BUILTIN, MEASURED)))}, a path ending in "
        ".toml, or 'module:callable'"
    )


@dataclass(frozen=True)
class Plugin:
    """A ``module:callable`` of the user's, its answers checked."""

    spec: str
    function: Callable[[ClientDescription, int], Any]
    varies: bool = True

    def __call__(self, client: ClientDescription, round: int) -> Budget:
        """What the function answers.

        Raises:
            ConfigError: When it raises, or its answer is no budget.
        """
        where = f"budgets = {self.spec!r}"
        try:
            answer = self.function(client, round)
        except Exception as error:
            raise ConfigError(
                f"{where} raised {type(error).__name__}: {error} "
                f"for client {client.client} in round {round}"
            ) from error
        if isinstance(answer, Budget):  # read back, so that its entries are checked too
            return Budget.from_mapping(answer.to_json(), where)
        if isinstance(answer, Mapping):
            return Budget.from_mapping({str(k): v for k, v in answer.items()}, where)
        raise ConfigError(
            f"{where} returned a {type(answer).__name__}; return a Budget or a mapping"
        )
