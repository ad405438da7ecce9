"""An option of a run: a field of a dataclass that carries all there is to say of it.

A group of options is a frozen dataclass whose fields are made by :func:`option`; the first line of
its docstring is the group's title. Default, range or choices, unit and sentence stand there and
nowhere else: checks, the comments in ``pyproject.toml``, ``docs/options.md`` and ``d2ft options``
are derived from them.
"""

import inspect
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from typing import Any

from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import meant

TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_INFINITE = float("inf")


@dataclass(frozen=True)
class Allowed:
    """The values that an option accepts, its type aside. Numbers have to be finite in any case.

    Attributes:
        low: The smallest value; None without such a bound.
        above: A bound that the value must exceed; None without one.
        high: The largest value; None without such a bound.
        below: A bound that the value must stay under; None without one.
        choices: All values there are; empty where any value in the range is accepted.
    """

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether an option may have this value."""
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        return (
            abs(value) < _INFINITE
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def words(self, kind: type) -> str:
        """Return the range or the choices in words, to follow "must be"; empty for any text.

        Args:
            kind: The type of the option's values.
        """
        if self.choices:
            named = [str(choice) for choice in self.choices if choice != ""]
            return " or ".join(named) if kind is int else ", ".join(named)
        if kind not in (int, float):
            return ""
        if self.low is not None and self.high is not None:
            return f"between {self.low} and {self.high}"
        bounds = []
        if self.low is not None:
            bounds.append(f"{self.low} or more")
        if self.above is not None:
            bounds.append(f"above {self.above}")
        if self.high is not None:
            bounds.append(f"{self.high} at most")
        if self.below is not None:
            bounds.append(f"below {self.below}")
        if kind is float and self.high is None and self.below is None:
            if self.above is not None:
                return f"a finite number above {self.above}"
            return ", ".join(["a finite number", *bounds])
        return ", and ".join(bounds)


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
    unit: str = "",
    no_path: tuple[str, ...] | None = None,
    read_by: str = "",
) -> Any:
    """Return the field of an option.

    Args:
        default: The value where nothing else is configured.
        text: What the option means, in sentences that stand alone.
        low: See :class:`Allowed`.
        above: See :class:`Allowed`.
        high: See :class:`Allowed`.
        below: See :class:`Allowed`.
        choices: See :class:`Allowed`.
        unit: What a number counts or is measured in.
        no_path: Of an option that names a file or folder, the values that are no path; None for an
            option that names none.
        read_by: The tuning that alone reads the option; empty where every run reads it.
    """
    allowed = Allowed(low, above, high, below, choices)
    metadata = {
        "text": text,
        "allowed": allowed,
        "unit": unit,
        "no_path": no_path,
        "read_by": read_by,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option, read off its field.

    Attributes:
        group: The title of the group that declares it.
        field: The field of the dataclass.
    """

    group: str
    field: Field[Any]

    @cached_property
    def key(self) -> str:
        """The name as files and commands write it."""
        return self.field.name.replace("_", "-")

    @property
    def kind(self) -> type:
        """The type of its values."""
        assert isinstance(self.field.type, type)
        return self.field.type

    @property
    def default(self) -> Any:
        """The value where nothing else is configured."""
        return self.field.default

    @property
    def text(self) -> str:
        """What the option means."""
        return self.field.metadata["text"]

    @property
    def unit(self) -> str:
        """What its number counts or is measured in; empty where it has no unit."""
        return self.field.metadata["unit"]

    @property
    def choices(self) -> tuple[Any, ...]:
        """All values there are; empty where any value in the range is accepted."""
        return self._allowed.choices

    @property
    def no_path(self) -> tuple[str, ...] | None:
        """Values that are no path, of an option that names a file or folder; None for others."""
        return self.field.metadata["no_path"]

    @property
    def read_by(self) -> str:
        """The tuning that alone reads the option; empty where every run reads it."""
        return self.field.metadata["read_by"]

    @property
    def allowed(self) -> str:
        """The range or the choices in words; empty where every value of the type is accepted."""
        return self._allowed.words(self.kind)

    @property
    def _allowed(self) -> Allowed:
        return self.field.metadata["allowed"]

    def check(self, value: Any) -> None:
        """Check a value of the right type.

        Raises:
            ConfigError: When the value is outside of the range, or no choice.
        """
        if self._allowed.accepts(value):
            return
        if self.kind is str:
            near = meant(value, self.choices)
            raise ConfigError(f"{self.key} = {value!r} is unknown{near}; use one of {self.allowed}")
        raise ConfigError(f"{self.key} = {value} must be {self.allowed}")

    def to_json(self) -> dict[str, Any]:
        """Return everything that there is to say of the option, for a program to read."""
        bounds = {
            name: bound
            for name in ("low", "above", "high", "below")
            if (bound := getattr(self._allowed, name)) is not None
        }
        return {
            "name": self.key,
            "group": self.group,
            "type": self.kind.__name__,
            "default": self.default,
            "range": bounds,
            "choices": list(self.choices),
            "unit": self.unit,
            "text": self.text,
        }


def options_of(record: type) -> dict[str, Option]:
    """Return the options of a dataclass by their keys, in the order of its fields.

    Args:
        record: A dataclass that inherits from the groups of its options.
    """
    titles: dict[str, str] = {}
    for group in reversed(record.__mro__):
        title = (group.__doc__ or "").strip().split("\n")[0].rstrip(".")
        titles |= dict.fromkeys(inspect.get_annotations(group), title)
    found = [Option(titles[f.name], f) for f in fields(record)]
    return {one.key: one for one in found}
