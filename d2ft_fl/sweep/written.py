"""Writing a sweep as TOML: the resolved one in its folder, which is a file to sweep again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d2ft_fl.util.strict_json import write_json

if TYPE_CHECKING:
    from d2ft_fl.sweep.spec import Group, Sweep


def toml_value(value: Any) -> str:
    """Write a value in one line: JSON's spelling is TOML's too, but for tables."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {toml_value(v)}" for key, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    return write_json(value, ensure_ascii=False)


def toml_sweep(sweep: "Sweep") -> str:
    """Write a sweep as a file that reads as an equal sweep wherever it lies."""
    run = sweep.run
    first = [group for group in sweep.groups if not group.place]
    lines = [f"name = {toml_value(sweep.name)}"]
    for group in first:
        lines += _seeds(group)
    lines += _table("base", sweep.base)
    for group in first:
        lines += _tables(group, "")
    for group in sweep.groups:
        if group.place:
            lines += ["", "[[group]]", *_seeds(group), *_table("group.base", group.base)]
            lines += _tables(group, "group.")
    asha: Any = False
    if run.asha is not None:
        asha = {
            "grace-rounds": run.asha.grace_rounds,
            "reduction-factor": run.asha.reduction_factor,
        }
    how: dict[str, Any] = {"at-once": run.at_once} if run.at_once else {}
    how |= {"address": run.address, "asha": asha, "keep-models": run.keep_models}
    return "\n".join([*lines, *_table("run", how), ""])


def _seeds(group: "Group") -> list[str]:
    return [f"seeds = {toml_value(group.seeds)}"] if group.seeds else []


def _tables(group: "Group", prefix: str) -> list[str]:
    search: dict[str, Any] = {}
    if group.search:
        search = {"samples": group.samples, "draw-seed": group.draw_seed}
        search |= {key: draw.to_toml() for key, draw in group.search.items()}
    return [*_table(f"{prefix}grid", group.grid), *_table(f"{prefix}search", search)]


def _table(name: str, entries: Mapping[str, Any]) -> list[str]:
    if not entries:
        return []
    return ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in entries.items())]
