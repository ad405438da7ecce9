"""Reads the file of a sweep, and says on which line what is wrong; ``spec.py`` has its shape."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2ft_fl.config.renamed import renamed
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.sources import absolute, parse_pairs, read_options
from d2ft_fl.errors import ConfigError
from d2ft_fl.sweep.draws import Choice, Draw, Span
from d2ft_fl.sweep.spec import Asha, Group, RunOptions, Sweep, place_name
from d2ft_fl.sweep.written import toml_value
from d2ft_fl.util.spelling import nearest
from d2ft_fl.util.toml import read_text
from d2ft_fl.util.toml_lines import Locator, error_line

TOP = ("name", "config", "seeds", "base", "grid", "search", "group", "run")
GROUP = ("seeds", "base", "grid", "search")
RUN = ("at-once", "address", "asha", "keep-models")
ASHA = ("grace-rounds", "reduction-factor")
SAMPLING = ("samples", "draw-seed")
OF_OPTIONS = ("base", "grid", "search")  # tables with options for keys
OWN = "run-folder"  # every trial has its own


def read_sweep(path: Path, pairs: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file.

    Args:
        path: The file.
        pairs: ``key=value`` over the options that all trials have in common.

    Raises:
        ConfigError: For a file that cannot be read, unknown keys, wrong types and empty lists, with
            the line.
    """
    text = read_text(path, "sweep")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}:{error_line(error, text)}: not TOML: {error}") from None
    return _Reader(Locator(path.name, text), path.parent).sweep(table, path.stem, pairs)


@dataclass(frozen=True)
class _Reader:
    """Reads one file. Methods raise ConfigError with the line of what is wrong."""

    at: Locator
    folder: Path

    def sweep(self, table: dict[str, Any], stem: str, pairs: Sequence[str]) -> Sweep:
        self.known(table, TOP)
        name = table.get("name", stem)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise self.error(("name",), f'{name!r} is no name of a folder; write name = "digits"')
        base = self.options(table, ("base",))
        first = self.group(table, ())
        tables = table.get("group", [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise self.error(("group",), "no table; begin each group with [[group]]")
        groups = []
        for number, entries in enumerate(tables):
            place = ("group", str(number))
            self.known(entries, GROUP, place)
            groups.append(self.group({"seeds": table.get("seeds")} | entries, place))
        if not groups or first.grid or first.search:
            groups.insert(0, first)
        over = parse_pairs(pairs)
        for key in over:
            if any(key in group.varied() for group in groups):
                raise ConfigError(f"--set {key}: {self.at.name} varies it; change it there")
            self.option(key, over[key], "--set")
        options, given = self.files(table.get("config", []))
        given |= {key: self.name(("base", key)) for key in base} | dict.fromkeys(over, "--set")
        return Sweep(name, options | base | over, tuple(groups), self.run(table), self.at, given)

    def group(self, table: dict[str, Any], place: tuple[str, ...]) -> Group:
        base = self.options(table, (*place, "base")) if place else {}
        grid = {
            key: self.values(value, (*place, "grid", key), key)
            for key, value in self.table(table, (*place, "grid")).items()
        }
        entries = self.table(table, (*place, "search"))
        sampling = {key: entries.pop(key) for key in SAMPLING if key in entries}
        search = {
            key: self.draw(value, (*place, "search", key), key) for key, value in entries.items()
        }
        if search and "samples" not in sampling:
            raise self.error((*place, "search"), "say how many draws, like samples = 20")
        if "search" in table and not search:
            raise self.error((*place, "search"), "no option to draw; name some, or leave it out")
        samples = self.whole(
            sampling.get("samples", 0), (*place, "search", "samples"), bool(search)
        )
        draw_seed = self.whole(sampling.get("draw-seed", 0), (*place, "search", "draw-seed"), 0)
        if twice := [key for key in search if key in grid]:
            raise self.error(
                (*place, "search", twice[0]), "is in [grid] too; write it in one of both"
            )
        seeds = self.seeds(table.get("seeds"), (*place, "seeds"))
        if seeds and "seed" in {**grid, **search}:
            raise self.error((*place, "seeds"), "the option seed varies too; write one of both")
        return Group(place, base, grid, search, samples, draw_seed, seeds)

    def run(self, table: dict[str, Any]) -> RunOptions:
        entries = self.table(table, ("run",))
        self.known(entries, RUN, ("run",))
        at_once = self.whole(entries.get("at-once", 0), ("run", "at-once"), 0)
        address = entries.get("address", "")
        if not isinstance(address, str):
            raise self.error(("run", "address"), f'{address!r} is no string, like "10.0.0.1:6379"')
        keep = self.truth(entries.get("keep-models", False), ("run", "keep-models"))
        return RunOptions(at_once, address, self.asha(entries.get("asha", False)), keep)

    def asha(self, value: Any) -> Asha | None:
        place = ("run", "asha")
        if not isinstance(value, dict):
            return Asha() if self.truth(value, place, "true, false or a table") else None
        self.known(value, ASHA, place)
        default = Asha()
        rounds = self.whole(value.get("grace-rounds", default.grace_rounds), place, 1)
        factor = value.get("reduction-factor", default.reduction_factor)
        if type(factor) not in (int, float) or not 1 < factor < float("inf"):
            raise self.error(place, f"reduction-factor = {factor!r} must be a number above 1")
        return Asha(rounds, float(factor))

    # -- values ------------------------------------------------------------------------------

    def seeds(self, value: Any, place: tuple[str, ...]) -> tuple[int, ...]:
        if value is None:
            return ()
        if isinstance(value, list):
            if not value:
                raise self.error(place, "no seeds; write a number, like 3, or some, like [0, 1, 2]")
            return tuple(
                dict.fromkeys(self.option("seed", seed, self.name(place)) for seed in value)
            )
        return tuple(range(self.whole(value, place, 1)))

    def values(self, value: Any, place: tuple[str, ...], key: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self.error(
                place, f"{value!r} is no list; write [{toml_value(value)}], or put it in [base]"
            )
        if not value:
            raise self.error(place, "no values; write some, or leave the option out")
        return tuple(dict.fromkeys(self.option(key, v, self.name(place)) for v in value))

    def draw(self, value: Any, place: tuple[str, ...], key: str) -> Draw:
        ends = isinstance(value, dict) and {"min", "max"} <= value.keys()
        if not ends and not (isinstance(value, dict) and "choice" in value):
            raise self.error(
                place,
                f"{value!r} is no distribution; write {{ min = 1, max = 2 }}, with log = true if "
                "wanted, or { choice = [1, 2] }",
            )
        if "choice" in value:
            self.known(value, ("choice",), place)
            return Choice(self.values(value["choice"], place, key))
        self.known(value, ("min", "max", "log"), place)
        least, most = (self.option(key, value[end], self.name(place)) for end in ("min", "max"))
        if type(least) not in (int, float):
            raise self.error(place, f"{key} is no number; write {{ choice = [...] }}")
        log = self.truth(value.get("log", False), place)
        if not float("-inf") < least < most < float("inf"):
            raise self.error(place, f"min = {least} must be below max = {most}, both finite")
        if log and least <= 0:
            raise self.error(place, f"min = {least} must be above 0 with log = true")
        return Span(least, most, log)

    def option(self, key: str, value: Any, where: str) -> Any:
        """Return a value as its option has it, paths absolute."""
        if key == OWN:
            raise ConfigError(f"{where}: {OWN} is each trial's own; name the sweep's by --output")
        try:
            config = RunConfig.from_mapping(absolute({key: value}, self.folder))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        return config.to_mapping()[key]

    def options(self, table: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        return {
            key: self.option(key, value, self.name((*place, key)))
            for key, value in self.table(table, place).items()
        }

    def files(self, names: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Read the options of some files, and the file of each."""
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error(("config",), f'{names!r} is no file; write config = "FILE.toml"')
        options, given = {}, {}
        for name in names:
            path = self.folder / Path(name).expanduser()
            for key, value in read_options(path).items():
                options[key], given[key] = self.option(key, value, path.name), path.name
        return options, given

    def table(self, table: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        """Return a copy of the table of that name, empty where there is none.

        Options are under their present names.
        """
        value = table.get(place[-1], {})
        if not isinstance(value, dict):
            raise self.error(place, f"{value!r} is no table; write [{place[-1]}]")
        if place[-1] == "grid" and value == {} and "grid" in table:
            raise self.error(place, "the grid is empty; name options, or leave it out")
        if place[-1] not in OF_OPTIONS:
            return dict(value)
        try:
            return renamed(value)
        except ConfigError as error:
            raise self.error(place, str(error)) from None

    def whole(self, value: Any, place: tuple[str, ...], least: int) -> int:
        if type(value) is not int or value < least:
            raise self.error(place, f"{value!r} must be a whole number, {int(least)} or more")
        return value

    def truth(self, value: Any, place: tuple[str, ...], allowed: str = "true or false") -> bool:
        if not isinstance(value, bool):
            raise self.error(place, f"{value!r} must be {allowed}")
        return value

    # -- places ------------------------------------------------------------------------------

    def known(
        self, table: Mapping[str, Any], keys: tuple[str, ...], place: tuple[str, ...] = ()
    ) -> None:
        if unknown := [key for key in table if key not in keys]:
            raise self.error((*place, unknown[0]), f"unknown key; {nearest(unknown[0], keys)}")

    def name(self, place: tuple[str, ...]) -> str:
        return place_name(self.at, place)

    def error(self, place: tuple[str, ...], text: str) -> ConfigError:
        return ConfigError(f"{self.name(place)}: {text}")
