"""Messages to clients: an assignment, and the slices of the global model that it needs."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.training_options import ExecutionPolicy
from d2ft_fl.costs.probe_costs import Probes
from d2ft_fl.costs.resources import RESOURCES
from d2ft_fl.errors import Refusal
from d2ft_fl.planning.assignment import Assignment
from d2ft_fl.rounds import message_fields as fields
from d2ft_fl.rounds.federation import Federation, State
from d2ft_fl.subnets.architecture import Architecture, has_fixed
from d2ft_fl.subnets.packing import carried, pack_for
from d2ft_fl.subnets.schedule import Operation, Schedule
from d2ft_fl.util.strict_json import whole
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
        digests: Names of the fixed parameters that the client needs; empty without any.
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
    digests: parameter_cache.Digests
    meta: Mapping[str, Any]

    @classmethod
    def decode(cls, blob: bytes, federation: Federation) -> "tuple[Message, dict[str, Tensor]]":
        """Return the message and packed tensors that :func:`encode_assignment` wrote.

        Of the message everything is checked that can be without the client and its data; of the
        tensors nothing.

        Args:
            blob: The message as it travels.
            federation: The federation, of any round.

        Raises:
            ReplyError: When the blob is no message at all.
            Refusal: With the first field that cannot be.
            ConfigError: For a schedule or a budget that cannot be.
        """
        tensors, meta = wire.decode(blob)
        fields.check_names(meta)
        config = federation.config
        number = whole(meta["round"], "round", 1, config.rounds)
        stage = federation.at(number)
        arch = stage.arch
        schedule = fields.schedule_of(meta, config.slots, arch)
        if fields.truth(meta["calibrate"], "calibrate") != stage.calibrates(number):
            raise Refusal("the message and the run's options differ on whether to calibrate")
        if ("holds" in meta) != has_fixed(arch):
            raise Refusal("the message and the model differ on whether parameters are fixed")
        budget = Budget.from_json(meta["budget"]) if "budget" in meta else None
        message = cls(
            client=whole(meta["client"], "client", 0, config.clients - 1),
            round=number,
            schedule=schedule,
            probes=fields.probes_of(meta["passes"]),
            examples=whole(meta["examples"], "examples", 1, fields.MOST_EXAMPLES),
            policy=fields.policy_of(meta["way"], config, arch),
            calibrates=meta["calibrate"],
            keeps=fields.keeps_of(meta["keeps"]),
            budget=budget if budget is not None and whole(meta["held"], "held", 0, 1) else None,
            cached=fields.held_of(meta["holds"], arch) if "holds" in meta else None,
            digests={},
            meta=meta,
        )
        if "digests" in meta:
            names = parameter_cache.read(message.carried, meta["digests"])
            message = replace(message, digests=names)
        return message, tensors

    def whole_size(self, arch: Architecture, came: Mapping[str, Tensor], bits: int) -> int:
        """Return the bytes that the message would have if its slices travelled with it.

        Args:
            arch: The architecture of the round.
            came: Tensors that did travel with the message.
            bits: Bits in which weights travel down.
        """
        offsets = [(name, tuple(t.shape), t.dtype) for name, t in came.items()]
        return wire.size([*self.slices(arch, bits), *offsets], self.meta)

    def slices(self, arch: Architecture, bits: int) -> list[wire.Described]:
        """Return name, shape and type of each slice that the message has, or is to be read with.

        Args:
            arch: The architecture of the round.
            bits: Bits in which weights travel down.
        """
        return [
            (p.name, (p.packed_shape(heads)[0], row_bytes(p, bits)), torch.uint8)
            if is_quantized(p, bits)
            else (p.name, p.packed_shape(heads) if heads else p.shape, torch.float32)
            for p, heads in carried(arch, self.carried, self.cached)
        ]

    @property
    def carried(self) -> Schedule:
        """The schedule whose slices the client gets: everything, where probes come first."""
        shape = self.schedule.operations.shape[1:]
        return Schedule.filled(Operation.FULL, 1, *shape) if self.probes else self.schedule
