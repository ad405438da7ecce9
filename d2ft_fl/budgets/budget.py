"""What a client can afford in one round, and how that is written.

A budget holds FLOPs, peak bytes of memory, bytes up and bytes down, each optional, each absolute
("2 GFLOP", "512 MiB") or relative ("40 %") to training everything, as the run tunes it, on the
client's own data at the configured batch size; and a deadline, the most simulated seconds that a
round may take it by its speed and bandwidths.

Memory is that of tensors, which plans are made of, or that of the process that trains: then what
the process takes beside them comes off. A share is always of tensors. An amount is of tensors in a
simulation and of the process on a device, unless ``memory-of`` says otherwise.

Where budgets come from: a TOML file of device classes (``device_classes.py``; two are built in), a
measurement of this machine (``machine.py``), or a ``module:callable`` of yours, given a
:class:`ClientDescription` and the round.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2ft_fl.costs.machine_speed import LEAST, MOST, MachineSpeed, is_name, read_curve
from d2ft_fl.costs.resources import RESOURCES, Cost
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import meant

DEADLINE = "deadline"
MEMORY_OF = "memory-of"
TEXTS = ("device", "memory_of")  # entries of JSON that are no numbers
TENSORS, PROCESS = "tensors", "process"
CURVE = "curve"  # a file of a machine's speed by shapes, or what stands in one
LIMITS = (*RESOURCES, DEADLINE)  # what a budget may limit
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
    "memory_base": (_BYTES, '"448 MiB"'),
    "bytes_up": (_BYTES, '"10 MB" or "40 %"'),
    "bytes_down": (_BYTES, '"10 MB" or "40 %"'),
    "speed": (_SPEEDS, '"10 GFLOP/s"'),
    "bandwidth_up": (_RATES, '"5 Mbit/s"'),
    "bandwidth_down": (_RATES, '"20 Mbit/s"'),
    "deadline": (_SECONDS, '"30 s" or "2 min"'),
}
ENTRIES = (*(name.replace("_", "-") for name in _UNITS), MEMORY_OF, CURVE)


@dataclass(frozen=True)
class Amount:
    """An amount of a resource: absolute, or a share of training everything."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite(self.value) or self.value < 0:
            raise ConfigError(f"a budget of {self.value} is negative or not finite")

    def resolve(self, full: int) -> int:
        """Return the amount in FLOPs or bytes, rounded down; ``full`` is what 100 % means."""
        wanted = self.value * full if self.relative else self.value
        return int(min(float(UNLIMITED), wanted))


@dataclass(frozen=True)
class Budget:
    """What one client can afford in one round; ``None`` is no limit.

    Attributes:
        flops: FLOPs of local training.
        memory: Bytes at the peak, of what :attr:`memory_of` says.
        bytes_up: Bytes that the client sends.
        bytes_down: Bytes that the client receives.
        speed: FLOP/s at best; ``None`` means that computing takes no time. How much slower what
            is computed runs, for its shapes, says the curve.
        bandwidth_up: Bytes/s; ``None`` means that sending takes no time.
        bandwidth_down: Bytes/s; ``None`` means that receiving takes no time.
        deadline: The most simulated :meth:`seconds` of a round.
        device: A name to report.
        curve: How fast such a machine is by shapes; None for the package's, scaled to ``speed``.
        memory_of: ``tensors`` or ``process``; empty where the budget does not say.
        memory_base: Bytes that the process takes beside tensors; None where that is not known yet.
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
    curve: MachineSpeed | None = None
    memory_of: str = ""
    memory_base: float | None = None

    @property
    def of_process(self) -> bool:
        """Whether memory is that of the process that trains."""
        return self.memory_of == PROCESS

    def limit(self, resource: str) -> Amount | None:
        """Return what plans may use of a resource: of memory, what is left for tensors.

        Args:
            resource: One of ``RESOURCES``.
        """
        amount: Amount | None = getattr(self, resource)
        if resource == "memory" and amount and not amount.relative and self.of_process:
            return Amount(max(0.0, amount.value - (self.memory_base or 0.0)))
        return amount

    def on(self, device: str, taken: int | None) -> "Budget":
        """Return the budget where it is used, with what the process takes in it.

        On a GPU memory is that of tensors; the driver's own, for the process, is not counted.

        Args:
            device: cpu or cuda: where the client trains.
            taken: Bytes that this process takes beside tensors, where it is the one that the
                budget is of; None in a simulation.

        Raises:
            ConfigError: When memory is of a process of which nobody says what it takes.
        """
        if self.memory is None or self.memory.relative:
            return self
        if taken is None:
            if self.of_process and self.memory_base is None:
                raise ConfigError(
                    f"{self._name}{MEMORY_OF} = 'process' needs memory-base in a simulation, what "
                    "the process takes beside tensors: write what d2ft profile says"
                )
            return self
        if device == "cuda":
            if self.of_process:
                raise ConfigError(
                    f"{self._name}{MEMORY_OF} = 'process' is of a CPU's memory, and device = "
                    "'cuda': leave it out, and leave what CUDA itself takes out of memory"
                )
            return self
        if self.memory_of == TENSORS:
            return self
        base = max(float(taken), self.memory_base or 0.0)
        return replace(self, memory_of=PROCESS, memory_base=base)

    @property
    def beside(self) -> str:
        """In words, what a process takes of its memory beside tensors; empty where that is none."""
        if not self.of_process or self.memory is None or self.memory.relative:
            return ""
        base, memory = self.memory_base or 0.0, self.memory.value
        return f" beside the {base:.0f} bytes that the process takes of {memory:.0f}"

    @property
    def _name(self) -> str:
        return f"{self.device}: " if self.device else ""

    def check(self, where: str) -> None:
        """Raise ConfigError where what it says of memory does not go together.

        Args:
            where: What the message begins with.
        """
        memory, base = self.memory, self.memory_base
        if not self.memory_of and base is None:
            return
        if memory is None or memory.relative:
            said = MEMORY_OF if self.memory_of else "memory-base"
            if memory is None or self.memory_of != TENSORS or base is not None:
                raise ConfigError(
                    f"{where}: {said} is of an amount of memory, and there is none: write one, "
                    'such as memory = "1 GiB"; a share is of tensors'
                )
        elif base is not None and not self.of_process:
            raise ConfigError(
                f"{where}: memory-base is what a process takes: write {MEMORY_OF} = 'process' too"
            )
        elif base is not None and base >= memory.value:
            raise ConfigError(
                f"{where}: memory = {memory.value:.4g} B of the process leaves nothing beside "
                f"memory-base = {base:.4g} B: write more memory"
            )

    def capacity(self, full: Cost) -> np.ndarray:
        """Return the four budgets in the order of ``RESOURCES``: int64 [4].

        ``UNLIMITED`` stands where there is no budget. Memory is what is left for tensors.

        Args:
            full: What training everything costs the client.
        """
        amounts = [self.limit(r) for r in RESOURCES]
        return np.array(
            [
                UNLIMITED if a is None else min(UNLIMITED, a.resolve(getattr(full, r)))
                for a, r in zip(amounts, RESOURCES, strict=True)
            ],
            dtype=np.int64,
        )

    def seconds(self, cost: Cost) -> float:
        """Return the simulated seconds of a round: download, compute, upload.

        Args:
            cost: Of the round, its work counted on :attr:`curve`.
        """
        parts = (
            (cost.bytes_down, self.bandwidth_down),
            (cost.work, self.speed),
            (cost.bytes_up, self.bandwidth_up),
        )
        return sum(amount / rate for amount, rate in parts if rate)

    def to_json(self) -> dict[str, Any]:
        """Return a form that :meth:`from_mapping` reads back exactly."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Amount):
                out[f.name] = {"share": value.value} if value.relative else value.value
            elif isinstance(value, MachineSpeed):
                out[f.name] = value.to_json()
            elif value not in (None, ""):
                out[f.name] = value
        return out

    @classmethod
    def from_mapping(
        cls, entries: Mapping[str, Any], where: str = "budget", written_by_us: bool = False
    ) -> "Budget":
        """Return a budget from a TOML table, a JSON object or what a plug-in returned.

        A curve may be the path of a file here: what another machine sent is for :meth:`from_json`.

        Args:
            entries: Names of entries, with ``-`` or ``_``, and their values.
            where: What error messages begin with.
            written_by_us: Whether :meth:`to_json` made them: people write no fractions of a byte.

        Raises:
            ConfigError: For an unknown, negative or unparsable entry, naming it.
        """
        values: dict[str, Any] = {}
        for key, value in entries.items():
            name = key.replace("-", "_")
            if name in values:
                raise ConfigError(f"{where}: {key} is given twice; write it once")
            if name == "device":
                if not is_name(value):
                    raise ConfigError(f"{where}: {key} must be a name of 60 letters at most")
                values[name] = value
            elif name == "memory_of":
                if value not in (TENSORS, PROCESS):
                    raise ConfigError(
                        f"{where}: {key} = {value!r} is unknown; use {TENSORS!r} or {PROCESS!r}"
                    )
                values[name] = value
            elif name == CURVE:
                read = read_curve if isinstance(value, (str, Path)) else MachineSpeed.from_json
                values[name] = read(value, f"{where}: {key}")
            elif name in _UNITS:
                said = f"{where}: {key} = {value!r}"
                values[name] = _parse(name, value, said)
                if not written_by_us:
                    _ask_whether_a_share(values[name], said)
            else:
                raise ConfigError(
                    f"{where}: unknown entry {key!r}{meant(key, ENTRIES)}; allowed are "
                    f"{', '.join(ENTRIES)}"
                )
        return cls(**values)

    @classmethod
    def from_json(cls, entries: Any, where: str = "budget") -> "Budget":
        """Return the budget that :meth:`to_json` wrote, on this machine or another.

        Nothing in it is taken for the path of a file.

        Args:
            entries: Any value of JSON.
            where: What error messages begin with.

        Raises:
            ConfigError: For anything that :meth:`to_json` does not write.
        """
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{where} is a {type(entries).__name__}, not a table")
        for key, value in entries.items():
            if isinstance(value, str) and key not in TEXTS:
                raise ConfigError(f"{where}: {str(key)[:60]!r} is text")
        return cls.from_mapping(entries, where, written_by_us=True)


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
    if number and not LEAST <= number <= MOST:
        raise ConfigError(
            f"{where} is out of all proportion: from {LEAST:g} to {MOST:g} in FLOPs, bytes and "
            f"seconds; write something like {example}"
        )
    if name in RESOURCES:
        return Amount(number, share)
    if share or number == 0:
        raise ConfigError(f"{where} must be absolute and above 0, like {example}")
    return number


def _ask_whether_a_share(amount: "Amount | float", where: str) -> None:
    """Raise ConfigError for an amount of less than one FLOP or byte, which is hardly meant."""
    if isinstance(amount, Amount) and not amount.relative and 0 < amount.value < 1:
        share = f'"{100 * amount.value:.4g} %"'
        raise ConfigError(
            f"{where} is less than one: if {amount.value:.4g} of training everything is meant, "
            f"write {share}"
        )


def _float(number: int | float) -> float:
    """Return a number as float; infinite where it is too large for one."""
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
