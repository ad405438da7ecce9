"""What a client is told to do, as it travels: an assignment with the slices that it needs."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import Probes
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.packing import carried, pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.wire import blob as wire
from d2ft_fl.wire import parameter_cache
from d2ft_fl.wire.quantization import is_quantized, quantize, row_bytes
from d2ft_fl.wire.sizes import RANK_BYTES


def encode_assignment(
    federation: Federation,
    state: State,
    a: Assignment,
    budget: Budget | None = None,
    holds_to_it: bool = True,
    shared: bool = False,
) -> bytes:
    """Return the message that tells a client what to do, with the slices that it needs.

    Args:
        budget: What the plan was made for, where the client may have another by now.
        holds_to_it: Whether that counts, and not its own.
        shared: Whether it finds the global model where it is, and takes the slices from there.
    """
    needed = a.schedule
    if a.probes:
        needed = federation.costs.everything()  # they run everything
    meta = {
        "round": state.round + 1,
        "client": a.client,
        "operations": a.schedule.operations.astype("int8").tobytes().hex(),
        "shape": list(a.schedule.operations.shape),
        "passes": [a.probes.scored, a.probes.viewed, *a.probes.kinds],
        "examples": a.examples,
        "way": list(astuple(a.policy)),
        "calibrate": federation.calibrates(state.round + 1),
        "keeps": [r for r in RESOURCES if r in federation.keeps],
    }
    if budget is not None:
        meta |= {"budget": budget.to_json(), "held": int(holds_to_it)}
    if a.schedule.ranks is not None:
        meta["ranks"] = a.schedule.ranks.astype(f"<u{RANK_BYTES}").tobytes().hex()
    cached = federation.cached(state, a.client)
    if cached is not None:
        meta["holds"] = np.packbits(cached).tobytes().hex()
        meta["digests"] = parameter_cache.write(needed, state.digests)
    tensors = {}
    if not shared:
        bits = a.policy.bits_down or federation.config.download_bits
        packed = pack_for(federation.arch, state.weights, needed, cached)
        tensors = quantize(federation.arch, packed, bits)
    if not a.probes and state.means.known is not None:
        weights = federation.model_weights(state)
        tensors |= state.means.offsets(federation.own or federation.arch, weights, a.schedule)
    return wire.encode(tensors, meta)


@dataclass(frozen=True, eq=False)
class Message:
    """The same, read by the client.

    Attributes:
        client, round: Whose, and when.
        schedule: Its operations. passes: What comes before. examples: On how many it trains.
        way: How it runs the schedule.
        calibrates: Whether to measure what subnets add on average.
        keeps: The budgets, of ``RESOURCES``, that the plan promises to keep.
        budget: What the client is held to, where that is not its own.
        holds: bool [blocks, heads], subnets whose fixed parameters it has; None without any.
        digests: Names of what is fixed, as :mod:`d2ft_fl.wire.parameter_cache` reads them.
        meta: All of this as it travels.
    """

    client: int
    round: int
    schedule: Schedule
    probes: Probes
    examples: int
    policy: ExecutionPolicy
    calibrates: bool
    keeps: tuple[str, ...]
    budget: Budget | None
    cached: np.ndarray | None
    digests: str
    meta: Mapping[str, Any]

    @classmethod
    def decode(cls, blob: bytes) -> "tuple[Message, dict[str, Tensor]]":
        """Read what :func:`encode_assignment` wrote: the message, and packed tensors."""
        tensors, meta = wire.decode(blob)
        schedule = _schedule(meta)
        cached = meta.get("holds")
        scored, viewed, *kinds = meta["passes"]
        message = cls(
            client=int(meta["client"]),
            round=int(meta["round"]),
            schedule=schedule,
            probes=Probes(scored, viewed, tuple(kinds)),
            examples=int(meta["examples"]),
            policy=ExecutionPolicy(*meta["way"]),
            calibrates=bool(meta["calibrate"]),
            keeps=tuple(meta["keeps"]),
            budget=Budget.from_mapping(meta["budget"]) if meta.get("held") else None,
            cached=None if cached is None else _unpacked(cached, schedule.resident.shape),
            digests=meta.get("digests", ""),
            meta=meta,
        )
        return message, tensors

    def whole_size(
        self,
        arch: Architecture,
        weights: Mapping[str, Tensor],
        came: Mapping[str, Tensor],
        bits: int,
    ) -> int:
        """Bytes of a message that leaves nothing where it is: as if it were not ``shared``.

        Args:
            weights: The global model. came: What came with the message that is.
            bits: In which numbers travel down.
        """
        slices = [
            (p.name, (p.packed_shape(heads)[0], row_bytes(p, bits)), torch.uint8)
            if is_quantized(p, bits)
            else (p.name, p.packed_shape(heads) if heads else p.shape, weights[p.name].dtype)
            for p, heads in carried(arch, self.carried, self.cached)
        ]
        offsets = [(name, tuple(t.shape), t.dtype) for name, t in came.items()]
        return wire.size([*slices, *offsets], self.meta)

    @property
    def carried(self) -> Schedule:
        """The schedule whose slices the client gets: everything, for passes before its own."""
        shape = self.schedule.operations.shape[1:]
        return Schedule.filled(Operation.FULL, 1, *shape) if self.probes else self.schedule


def _schedule(meta: Mapping[str, Any]) -> Schedule:
    """Return the schedule of a message."""
    shape = meta["shape"]
    operations = np.frombuffer(bytes.fromhex(meta["operations"]), dtype=np.int8).reshape(shape)
    if "ranks" not in meta:
        return Schedule(operations)
    ranks = np.frombuffer(bytes.fromhex(meta["ranks"]), dtype=f"<u{RANK_BYTES}")
    return Schedule(operations, ranks.astype(np.int64).reshape(shape[1:]))


def _unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Truth values of a message: bool of a shape."""
    data = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(data, count=int(np.prod(shape))).reshape(shape).astype(bool)
