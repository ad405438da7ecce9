"""Messages to clients: an assignment, and the slices of the global model that it needs."""

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
    assignment: Assignment,
    budget: Budget | None = None,
    binding: bool = True,
    shared: bool = False,
) -> bytes:
    """Return the message that tells a client what to do, with the slices that it needs.

    Args:
        federation: The federation of the round.
        state: The state that the round starts from.
        assignment: What the client is to do.
        budget: The budget that the plan was made for; None where the client knows it.
        binding: Whether the client keeps ``budget``, instead of the one that it has by now.
        shared: Whether the client reads the slices from shared memory, so that none are sent.
    """
    needed = assignment.schedule
    if assignment.probes:
        needed = federation.costs.everything()  # probes run everything
    meta = {
        "round": state.round + 1,
        "client": assignment.client,
        "operations": assignment.schedule.operations.astype("int8").tobytes().hex(),
        "shape": list(assignment.schedule.operations.shape),
        "passes": [assignment.probes.scored, assignment.probes.viewed, *assignment.probes.kinds],
        "examples": assignment.examples,
        "way": list(astuple(assignment.policy)),
        "calibrate": federation.calibrates(state.round + 1),
        "keeps": [r for r in RESOURCES if r in federation.keeps],
    }
    if budget is not None:
        meta |= {"budget": budget.to_json(), "held": int(binding)}
    if assignment.schedule.ranks is not None:
        meta["ranks"] = assignment.schedule.ranks.astype(f"<u{RANK_BYTES}").tobytes().hex()
    cached = federation.cached(state, assignment.client)
    if cached is not None:
        meta["holds"] = np.packbits(cached).tobytes().hex()
        meta["digests"] = parameter_cache.write(needed, state.digests)
    tensors = {}
    if not shared:
        bits = assignment.policy.bits_down or federation.config.download_bits
        packed = pack_for(federation.arch, state.weights, needed, cached)
        tensors = quantize(federation.arch, packed, bits)
    if not assignment.probes and state.means.known is not None:
        weights = federation.model_weights(state)
        tensors |= state.means.offsets(federation.model_arch, weights, assignment.schedule)
    return wire.encode(tensors, meta)


@dataclass(frozen=True, eq=False)
class Message:
    """An assignment as the client reads it.

    Attributes:
        client: The number of the client.
        round: The round, counted from 1.
        schedule: Which operations the client runs.
        probes: What it does with the whole model before training.
        examples: On how many examples it trains.
        policy: How it executes the schedule.
        calibrates: Whether to measure what subnets add on average.
        keeps: The budgets, of ``RESOURCES``, that the plan promises to keep.
        budget: The budget that the client must keep; None for the one that it has by now.
        cached: Subnets whose fixed parameters it has cached: bool [blocks, heads]; None where the
            model has no fixed parameters.
        digests: Names of fixed parameters, as :mod:`d2ft_fl.wire.parameter_cache` reads them.
        meta: The message's metadata as they travel.
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
        """Return the message and packed tensors that :func:`encode_assignment` wrote.

        Args:
            blob: The message as it travels.
        """
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
            budget=Budget.from_json(meta["budget"]) if meta.get("held") else None,
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
        """Return the bytes that the message would have if its slices travelled with it.

        Args:
            arch: The architecture of the round.
            weights: The global model, by name.
            came: Tensors that did travel with the message.
            bits: Bits in which weights travel down.
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
        """The schedule whose slices the client gets: everything, where probes come first."""
        shape = self.schedule.operations.shape[1:]
        return Schedule.filled(Operation.FULL, 1, *shape) if self.probes else self.schedule


def _schedule(meta: Mapping[str, Any]) -> Schedule:
    """Return the schedule that a message describes."""
    shape = meta["shape"]
    operations = np.frombuffer(bytes.fromhex(meta["operations"]), dtype=np.int8).reshape(shape)
    if "ranks" not in meta:
        return Schedule(operations)
    ranks = np.frombuffer(bytes.fromhex(meta["ranks"]), dtype=f"<u{RANK_BYTES}")
    return Schedule(operations, ranks.astype(np.int64).reshape(shape[1:]))


def _unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return truth values that a message packs as hexadecimal text: bool of ``shape``."""
    data = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(data, count=int(np.prod(shape))).reshape(shape).astype(bool)
