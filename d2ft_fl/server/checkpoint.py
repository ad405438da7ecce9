"""What a run needs to go on from the end of a round: one file a round, the last two are kept.

    checkpoints/round-0007.safetensors

holds the state's tensors, and as metadata the rest as JSON: which run it is of, what clients said
of themselves, and a digest of everything. It is written beside, synced and renamed, so that it is
whole or not there. Nothing in it is code.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ft_fl.aggregation.mean_compensation import MeanBook
from d2ft_fl.aggregation.server_optimizer import Moments
from d2ft_fl.budgets.budget import Budget
from d2ft_fl.config.renamed import renamed
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.errors import ConfigError, ReplyError, RunError
from d2ft_fl.planning.importance import ScoreBook
from d2ft_fl.rounds.components import Components
from d2ft_fl.rounds.federation import Report, State
from d2ft_fl.util.files import put_in_place, sync, writing
from d2ft_fl.util.strict_json import write_json
from d2ft_fl.wire.blob import decode, write

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
KEEP = 2
FORMAT = 1
_NAME = re.compile(r"round-(\d+)\.safetensors")
# What a run may change when it goes on: nothing that its rounds depend on.
FREE = frozenset(
    {
        "rounds",
        "run-folder",
        "resume",
        "trackers",
        "round-timeout",
        "client-timeout",
        "min-replies",
        "few-replies",
        "attempts",
        "checkpoint-every",
        "eval-every",
        "transport",
        "verify-costs",
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """The end of a round.

    Attributes:
        state: The federation's state after the round.
        reports: Client -> what it reported of itself.
    """

    state: State
    reports: Mapping[int, Report]


def save(folder: Path, config: RunConfig, origin: str, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of a round into a run's folder; older ones but one are deleted.

    Args:
        folder: The run folder.
        config: The options of the run.
        origin: Says from which weights the run began, see :func:`digest_of`.
        checkpoint: What to write.

    Returns:
        The file.

    Raises:
        RunError: When it cannot be written.
    """
    path = folder / FOLDER / f"round-{checkpoint.state.round:04d}.safetensors"
    tensors, meta = _pack(checkpoint)
    meta |= {"format": FORMAT, "origin": origin, "config": config.to_mapping()}
    meta |= {"digest": _digest(tensors, meta)}
    part = path.with_suffix(".part")
    try:
        with writing(path):
            if not path.parent.exists():
                path.parent.mkdir(mode=0o700)
                sync(folder)
            write(part, tensors, meta)
            part.chmod(0o600)
            put_in_place(part, path)
            for _, old in list(_found(folder))[KEEP:]:
                old.unlink()
    except RunError:
        part.unlink(missing_ok=True)  # it may have filled the disk
        raise
    return path


def load(folder: Path, config: RunConfig, origin: str) -> Checkpoint | None:
    """Read the last checkpoint of a run that can be used; None where there is none.

    A checkpoint that is damaged, or of another run, is left out, and the reason logged.

    Args:
        folder: The run folder.
        config: The options of the run that goes on.
        origin: As for :func:`save`.

    Raises:
        ConfigError: When there are checkpoints, and none can be used: names what is wrong with the
            last.
    """
    wrong = ""
    for _, path in _found(folder):
        try:
            return _read(path, config, origin)
        except (ReplyError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, _Unusable) else f"it is damaged: {error}"
            log.warning("checkpoint %s is not used: %s", path.name, reason)
            wrong = wrong or f"{path}: {reason}"
    if wrong:
        raise ConfigError(f"resume: no checkpoint can be used: {wrong}")
    return None


class _Unusable(ValueError):
    """A checkpoint is whole, and of no use here."""


def _found(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield round number and file of every checkpoint, the last first."""
    files = [(m, p) for p in folder.glob(f"{FOLDER}/*") if (m := _NAME.fullmatch(p.name))]
    yield from sorted(((int(m[1]), p) for m, p in files), reverse=True)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return a name for these weights."""
    return _digest(weights, {})


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    total = hashlib.blake2b(write_json(meta, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path, config: RunConfig, origin: str) -> Checkpoint:
    mapped, meta = decode(path)  # nothing is read that is larger than it should be
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    written = meta.pop("digest")
    if _digest(tensors, meta) != written:
        raise ValueError("its digest is another")
    if meta["format"] != FORMAT:
        raise _Unusable(f"it has format {meta['format']}, this version writes {FORMAT}")
    now = config.to_mapping()
    free = FREE - {"rounds"} if Components(config).depends_on_rounds else FREE
    then = renamed(meta["config"], quietly=True)
    for key, value in now.items():
        if key not in free and then.get(key) != value:
            raise _Unusable(f"it is of a run with {key} = {then.get(key)!r}, not {value!r}")
    if meta["origin"] != origin:
        raise _Unusable("it is of a run that began with other weights")
    found = _unpack(tensors, meta)
    if meta["config"]["transport"] != config.transport:  # what came through memory nobody kept
        found = replace(found, state=replace(found.state, cached={}))
    return found


# -- state and reports as tensors and JSON -------------------------------------------------------


def _pack(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = checkpoint.state
    tensors = {f"weights/{name}": t for name, t in state.weights.items()}
    for name, moments in state.moments.items():
        for part in fields(Moments):
            if (moment := getattr(moments, part.name)) is not None:
                tensors[f"moments.{part.name}/{name}"] = moment
    for kind, known in state.scores.means.items():
        tensors[f"scores/{kind}"] = torch.from_numpy(known)
    for (block, branch), mean in state.means.means.items():
        tensors[f"means/{block}.{branch}"] = mean
    if state.means.known is not None:
        tensors["known/means"] = torch.from_numpy(state.means.known).to(torch.int64)
    tensors["last/trained"] = torch.from_numpy(np.asarray(state.last_trained))
    clients = sorted(state.cached)
    if clients:
        held = np.stack([state.cached[client] for client in clients])
        tensors["holds/all"] = torch.from_numpy(np.packbits(held, axis=None))
    meta = {
        "round": state.round,
        "figures": dict(state.figures),
        "digests": [[*group, name] for group, name in state.digests.items()],
        "holds": clients,
        "reports": [
            [r.client, r.examples, r.budget.to_json()] for r in checkpoint.reports.values()
        ],
    }
    return tensors, meta


def _unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Checkpoint:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    first, second = parts.get("moments.first", {}), parts.get("moments.second", {})
    known = parts["known"]["means"].numpy().astype(bool) if "known" in parts else None
    means = {
        (int(block), int(branch)): tensor
        for name, tensor in parts.get("means", {}).items()
        for block, branch in [name.split(".")]
    }
    digests = {(block, head): name for block, head, name in meta["digests"]}
    last = parts["last"]["trained"].numpy()
    state = State(
        int(meta["round"]),
        parts["weights"],
        ScoreBook({kind: t.numpy() for kind, t in parts.get("scores", {}).items()}),
        MeanBook(means, known),
        last,
        _holds(meta["holds"], parts, last.shape),
        digests,
        meta["figures"],
        {name: Moments(t, second.get(name)) for name, t in first.items()},
    )
    reports = {
        client: Report(client, examples, Budget.from_json(budget))
        for client, examples, budget in meta["reports"]
    }
    return Checkpoint(state, reports)


def _holds(
    clients: list[int], parts: Mapping[str, Mapping[str, Tensor]], shape: tuple[int, ...]
) -> dict[int, np.ndarray]:
    if not clients:
        return {}
    count = len(clients) * int(np.prod(shape))
    bits = np.unpackbits(parts["holds"]["all"].numpy(), count=count).astype(bool)
    return dict(zip(clients, bits.reshape(-1, *shape), strict=True))
