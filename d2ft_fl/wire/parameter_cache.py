"""What clients have already: parameters that never change travel once.

Fixed parameters come in groups: those of embedding and final part, those that a block's subnets
share, and the slices of each subnet. The server knows which subnets' groups a client has (and with
any of a block's the block's, with any at all the outer ones), and leaves them out. A client keeps
groups in files named by a digest of what is in them, so that clients on one machine, and runs that
begin from the same weights, share them; a group that changes after all gets another name.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import platformdirs
import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.errors import Refusal
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.packing import down_spec
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.wire import blob

Group = tuple[int, int]  # (block, head); (block, -1) of a block; (-1, -1) the outer one
Digests = dict[Group, str]
DIGEST_BYTES = 8
KEEP_DAYS = 30.0
OUTER: Group = (-1, -1)


def _fixed(arch: Architecture) -> dict[int, list[Parameter]]:
    """Fixed parameters by block."""
    found: dict[int, list[Parameter]] = {}
    for p in arch.parameters:
        if p.fixed:
            found.setdefault(p.block, []).append(p)
    return found


def _group(own: list[Parameter], weights: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """One group's tensors, out of whole weights."""
    if head < 0:
        return {p.name: weights[p.name] for p in own if p.kind is not Kind.SLICED}
    return {p.name: p.pack(weights[p.name], [head]) for p in own if p.kind is Kind.SLICED}


def digests(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    before: Digests | None = None,
    changed: np.ndarray | None = None,
) -> Digests:
    """The name of every group.

    Args:
        before: Names to keep where nothing has ``changed``: bool [blocks, heads].
    """
    found = dict(before or {})
    by_block = _fixed(arch)
    for block in range(arch.blocks):
        for head in range(-1, arch.heads):
            if before is None or (head >= 0 and changed is not None and changed[block, head]):
                own = by_block.get(block, [])
                found[block, head] = _digest(_group(own, weights, head))
    if before is None:
        found[OUTER] = _digest(_group(by_block.get(-1, []), weights, -1))
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(str(tuple(tensors[name].shape)).encode())
        total.update(tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def groups_of(schedule: Schedule) -> Iterator[Group]:
    """The groups that a schedule needs, in order."""
    yield OUTER
    for block, row in enumerate(schedule.resident):
        if row.any():
            yield block, -1
            yield from ((block, int(head)) for head in np.flatnonzero(row))


def is_held(group: Group, cached: np.ndarray) -> bool:
    """Whether a client with these subnets' groups (bool [blocks, heads]) has one."""
    block, head = group
    if block < 0:
        return bool(cached.any())
    return bool(cached[block, head] if head >= 0 else cached[block].any())


def write(schedule: Schedule, names: Digests) -> str:
    """The names of the groups that a schedule needs, for its message."""
    return "".join(names[group] for group in groups_of(schedule))


def read(schedule: Schedule, text: str) -> Digests:
    """The names that :func:`write` wrote."""
    width = 2 * DIGEST_BYTES
    return {group: text[i * width : (i + 1) * width] for i, group in enumerate(groups_of(schedule))}


@dataclass(frozen=True)
class ParameterCache:
    """A client's groups, as files.

    Attributes:
        intact: Files, by name, inode and size, that this process found to hold what they should.
    """

    folder: Path
    intact: set[tuple[str, int, int]] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def default(cls) -> "ParameterCache":
        """The one in the user's cache folder, or in that which ``D2FT_WEIGHTS`` names."""
        folder = os.environ.get("D2FT_WEIGHTS")
        cache = platformdirs.user_cache_path("d2ft-fl", appauthor=False)
        return cls(Path(folder) if folder else cache / "weights")

    def prune(self, days: float = KEEP_DAYS) -> None:
        """Delete what was not used for so long. A client that misses it says so, and gets it."""
        oldest = time.time() - 86_400 * days
        for path in self.folder.glob("*/*"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def complete(
        self,
        arch: Architecture,
        schedule: Schedule,
        tensors: Mapping[str, Tensor],
        cached: np.ndarray,
        names: Digests,
    ) -> dict[str, Tensor]:
        """What came down together with what was left out, as of ``down_spec``.

        Raises:
            Refusal: When a group is gone that the server believes to be here.
        """
        by_block = _fixed(arch)
        parts: dict[str, list[Tensor]] = {}
        for group in groups_of(schedule):
            block, head = group
            own = by_block.get(block, [])
            if is_held(group, cached):
                found = self._load(names[group])
            else:
                found = _cut(own, tensors, schedule.resident[block] & ~cached[block], head)
                self._save(names[group], found)
            for name, tensor in found.items():
                parts.setdefault(name, []).append(tensor)
        whole = {name: t for name, t in tensors.items() if name not in parts}
        whole |= {name: ts[0] if len(ts) == 1 else torch.cat(ts) for name, ts in parts.items()}
        if whole.keys() < down_spec(arch, schedule).keys():
            raise Refusal("the weights that are kept here are not those of this run")
        return whole

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _load(self, name: str) -> dict[str, Tensor]:
        found = self._read(name)
        if found is None:
            raise Refusal("weights that it was sent before are gone here")
        return found

    def _read(self, name: str) -> dict[str, Tensor] | None:
        """A group, whole as it was written; None where there is none."""
        path = self._path(name)
        with suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
            os.utime(path)
            found, key = blob.mapped(path)[1], self._key(name)
            if key in self.intact or _digest(found) == name:  # once a process, not once a round
                self.intact.add(key)
                return found
        return None

    def _key(self, name: str) -> tuple[str, int, int]:
        status = self._path(name).stat()
        return name, status.st_ino, status.st_size

    def _has(self, name: str) -> bool:
        with suppress(OSError):
            if self._key(name) in self.intact:
                return True
        return self._read(name) is not None

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a group that is not there, at once or not at all: others may write the same."""
        if self._has(name):
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        try:
            safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, part)
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


def _cut(
    own: list[Parameter], tensors: Mapping[str, Tensor], sent: np.ndarray, head: int
) -> dict[str, Tensor]:
    """One group, out of packed tensors of the heads that were ``sent``: bool [heads]."""
    if head < 0:
        return {p.name: tensors[p.name] for p in own if p.kind is not Kind.SLICED}
    found = {}
    for p in own:
        if p.kind is Kind.SLICED:
            start = sum(len(p.rows[h]) for h in np.flatnonzero(sent[:head]))
            found[p.name] = tensors[p.name][start : start + len(p.rows[head])]
    return found
