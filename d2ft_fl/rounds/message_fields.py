"""The fields of a message to a client: type, form and range of each.

A server may be another than its clients take it for. What it says is used only after it was read
here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from d2ft_fl.config.choices import DOWNLOAD_BITS, UPLOAD_BITS
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import Probes
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import Refusal
from d2ft_fl.planning.importance import MEASURED
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.util.strict_json import SHOWN, refused, whole
from d2ft_fl.wire.sizes import RANK_BYTES

NEEDED = frozenset(
    {"round", "client", "operations", "shape", "passes", "examples", "way", "calibrate", "keeps"}
)
# Fields that come together, or not at all.
OPTIONAL = (frozenset({"budget", "held"}), frozenset({"ranks"}), frozenset({"holds", "digests"}))
MOST_EXAMPLES = 10**9
MOST_BATCH = 10**6
MOST_FACTOR = 1e6  # of rates, of what an example counts, of steps


def check_names(meta: Mapping[str, Any]) -> None:
    """Refuse a message that lacks fields, or has some that it should not have."""
    names = set(meta)
    for together in OPTIONAL:
        if together <= names:
            names -= together
    if odd := sorted(names ^ NEEDED):
        state = "lacks" if odd[0] in NEEDED else "cannot have"
        raise Refusal(f"the message {state} {odd[0][:SHOWN]!r}")


def truth(value: Any, what: str) -> bool:
    """Return a truth value, once it is one."""
    if type(value) is not bool:
        raise refused(value, what, "true or false")
    return value


def content(value: Any, what: str, count: int) -> bytes:
    """Return bytes, once they are so many, written in hexadecimal."""
    try:
        data = bytes.fromhex(value) if len(value) == 2 * count else b""
    except (TypeError, ValueError):
        data = b""
    if not isinstance(value, str) or len(data) != count:
        raise refused(value, what, f"{count} bytes in hexadecimal")
    return data


def schedule_of(meta: Mapping[str, Any], slots: int, arch: Architecture) -> Schedule:
    """Return the schedule of a message, once it is one of a round's architecture."""
    shape = [slots, arch.blocks, arch.heads]
    if meta["shape"] != shape or any(type(n) is not int for n in meta["shape"]):
        raise refused(meta["shape"], "shape", str(shape))
    codes = content(meta["operations"], "operations", int(np.prod(shape)))
    operations = np.frombuffer(codes, dtype=np.int8).reshape(shape)
    ranks = None
    if "ranks" in meta:
        codes = content(meta["ranks"], "ranks", RANK_BYTES * arch.blocks * arch.heads)
        ranks = np.frombuffer(codes, dtype=f"<u{RANK_BYTES}").astype(np.int64).reshape(shape[1:])
    schedule = Schedule(operations, ranks)
    if schedule.sits_out:
        raise Refusal("the message assigns nothing")
    used = None if ranks is None else ranks[schedule.trained]
    if used is not None and not ((used >= 1) & (used <= arch.rank)).all():
        raise Refusal(f"the message has ranks that are not 1 to {arch.rank}")
    return schedule


def probes_of(value: Any) -> Probes:
    """Return the probes of a message."""
    if not isinstance(value, list) or len(value) < 2:
        raise refused(value, "passes", "two numbers and kinds of scores")
    scored, viewed = (whole(n, "passes", 0, MOST_EXAMPLES) for n in value[:2])
    kinds = tuple(value[2:])
    if kinds != tuple(kind for kind in MEASURED if kind in kinds) or bool(kinds) != bool(scored):
        raise refused(value, "passes", "to score examples, by kinds that can be measured")
    return Probes(scored, viewed, kinds)


def policy_of(value: Any, config: RunConfig, arch: Architecture) -> ExecutionPolicy:
    """Return the execution policy of a message.

    Whether its bits and tokens go together with all else says the cost model.
    """
    if not isinstance(value, list) or len(value) != len(ExecutionPolicy.__dataclass_fields__):
        raise refused(value, "way", "an execution policy")
    way = ExecutionPolicy(*value)
    for name, low, high in (
        ("micro_batches", 1, max(config.batch_size, config.micro_batches)),
        ("tokens", arch.prefix + 1, arch.tokens),
        ("bits_up", min(UPLOAD_BITS), max(UPLOAD_BITS)),
        ("bits_down", min(DOWNLOAD_BITS), max(DOWNLOAD_BITS)),
        ("batch", config.slots, MOST_BATCH),
    ):
        if (number := getattr(way, name)) is not None:
            whole(number, name, low, high)
    if way.checkpointing is not None:
        truth(way.checkpointing, "checkpointing")
    truth(way.in_turn, "in_turn")
    for name in ("rate", "weight", "step"):
        factor = getattr(way, name)
        if type(factor) not in (int, float) or not 0 < factor <= MOST_FACTOR:
            raise refused(factor, name, f"above 0, and {MOST_FACTOR:g} at most")
    return way


def keeps_of(value: Any) -> tuple[str, ...]:
    """Return the budgets that a plan promises to keep."""
    if not isinstance(value, list) or value != [r for r in RESOURCES if r in value]:
        raise refused(value, "keeps", f"of {', '.join(RESOURCES)}, in this order")
    return tuple(value)


def held_of(value: Any, arch: Architecture) -> np.ndarray:
    """Return which subnets a message leaves fixed parameters of out: bool [blocks, heads]."""
    count = arch.blocks * arch.heads
    data = np.frombuffer(content(value, "holds", -(-count // 8)), dtype=np.uint8)
    if np.unpackbits(data)[count:].any():
        raise Refusal("the message's holds are of more subnets than there are")
    return np.unpackbits(data, count=count).reshape(arch.blocks, arch.heads).astype(bool)
