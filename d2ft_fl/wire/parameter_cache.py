"""The cache of a client's fixed parameters: what never changes travels once.

Fixed parameters come in groups: those of embedding and final part, those that a block's subnets
share, and the slices of each subnet. The server knows which subnets' groups a client has (and with
any of a block's the block's, with any at all the outer ones), and leaves them out. A client keeps
groups in files named by a digest of what is in them, so that clients on one machine, and runs that
begin from the same weights, share them; a group that changes after all gets another name.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from d2ft_fl.errors import Refusal
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.schedule import Schedule
from d2ft_fl.util import cache
from d2ft_fl.util.files import writing
from d2ft_fl.wire import blob

Group = tuple[int, int]  # (block, head); (block, -1) of a block; (-1, -1) the outer one
Digests = dict[Group, str]
DIGEST_BYTES = 8
FILES = rf"[0-9a-f]{{2}}/[0-9a-f]{{{2 * DIGEST_BYTES}}}\.safetensors"
OUTER: Group = (-1, -1)
_HEX = re.compile("[0-9a-f]*")


def _fixed(arch: Architecture) -> dict[int, list[Parameter]]:
    """Return fixed parameters by block."""
    by_block: dict[int, list[Parameter]] = {}
    for p in arch.parameters:
        if p.fixed:
            by_block.setdefault(p.block, []).append(p)
    return by_block


def _group(
    parameters: list[Parameter], weights: Mapping[str, Tensor], head: int
) -> dict[str, Tensor]:
    """Return one group's tensors, out of whole weights."""
    if head < 0:
        return {p.name: weights[p.name] for p in parameters if p.kind is not Kind.SLICED}
    return {p.name: p.pack(weights[p.name], [head]) for p in parameters if p.kind is Kind.SLICED}


def digests(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    before: Digests | None = None,
    changed: np.ndarray | None = None,
) -> Digests:
    """Return the name of every group.

    Args:
        arch: The architecture.
        weights: The whole model's.
        before: Names from before, kept where nothing has changed; None to work out all.
        changed: Subnets whose fixed parameters have changed: bool [blocks, heads].
    """
    names = dict(before or {})
    by_block = _fixed(arch)
    for block in range(arch.blocks):
        for head in range(-1, arch.heads):
            if before is None or (head >= 0 and changed is not None and changed[block, head]):
                parameters = by_block.get(block, [])
                names[block, head] = _digest(_group(parameters, weights, head))
    if before is None:
        names[OUTER] = _digest(_group(by_block.get(-1, []), weights, -1))
    return names


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(str(tuple(tensors[name].shape)).encode())
        total.update(tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def groups_of(schedule: Schedule) -> Iterator[Group]:
    """Yield the groups that a schedule needs, in order."""
    yield OUTER
    for block, row in enumerate(schedule.resident):
        if row.any():
            yield block, -1
            yield from ((block, int(head)) for head in np.flatnonzero(row))


def is_held(group: Group, cached: np.ndarray) -> bool:
    """Whether a client has a group.

    Args:
        group: The group.
        cached: Subnets whose groups the client has: bool [blocks, heads].
    """
    block, head = group
    if block < 0:
        return bool(cached.any())
    return bool(cached[block, head] if head >= 0 else cached[block].any())


def write(schedule: Schedule, names: Digests) -> str:
    """Return the names of the groups that a schedule needs, for its message."""
    return "".join(names[group] for group in groups_of(schedule))


def read(schedule: Schedule, text: Any) -> Digests:
    """Return the names that :func:`write` wrote.

    They become names of files.

    Raises:
        Refusal: When the text is anything else than digests, one of each group.
    """
    width, groups = 2 * DIGEST_BYTES, list(groups_of(schedule))
    if not isinstance(text, str) or len(text) != width * len(groups) or not _HEX.fullmatch(text):
        raise Refusal(f"the message has digests that are not {len(groups)} of {width} digits")
    return {group: text[i * width : (i + 1) * width] for i, group in enumerate(groups)}


@dataclass(frozen=True)
class ParameterCache:
    """A client's groups, as files.

    Attributes:
        folder: Where the files are.
        intact: Files, by name, inode and size, whose content this process has checked.
    """

    folder: Path
    intact: set[tuple[str, int, int]] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def default(cls) -> "ParameterCache":
        """Return the cache in the folder ``D2FT_WEIGHTS``, else in the user's cache folder.

        In a folder that somebody names there may be other things: the cache is one in there.
        """
        named = os.environ.get("D2FT_WEIGHTS")
        return cls(Path(named) / "d2ft-weights" if named else cache.folder("weights"))

    def prune(self) -> None:
        """Delete groups that were not used for long: a missing one is sent again."""
        cache.prune(self.folder, FILES)

    def complete(
        self,
        arch: Architecture,
        schedule: Schedule,
        tensors: Mapping[str, Tensor],
        cached: np.ndarray,
        names: Digests,
    ) -> dict[str, Tensor]:
        """Put together what came down and what was left out, as of ``down_spec``.

        Args:
            arch: The architecture.
            schedule: What the client is to run.
            tensors: What came down, by name.
            cached: Subnets whose groups were left out: bool [blocks, heads].
            names: The names of the groups that the schedule needs.

        Raises:
            Refusal: When a group is gone that the server believes to be here, or one comes under
                the name of another.
        """
        by_block = _fixed(arch)
        parts: dict[str, list[Tensor]] = {}
        for group in groups_of(schedule):
            block, head = group
            parameters = by_block.get(block, [])
            if is_held(group, cached):
                of_group = self._load(names[group])
            else:
                of_group = _cut(
                    parameters, tensors, schedule.resident[block] & ~cached[block], head
                )
                if _digest(of_group) != names[group]:
                    raise Refusal("weights came that are not those of their digest")
                self._save(names[group], of_group)
            for name, tensor in of_group.items():
                parts.setdefault(name, []).append(tensor)
        whole = {name: t for name, t in tensors.items() if name not in parts}
        whole |= {name: ts[0] if len(ts) == 1 else torch.cat(ts) for name, ts in parts.items()}
        return whole

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _load(self, name: str) -> dict[str, Tensor]:
        tensors = self._read(name)
        if tensors is None:
            raise Refusal("weights that it was sent before are gone here")
        return tensors

    def _read(self, name: str) -> dict[str, Tensor] | None:
        """Return a group, whole as it was written; None where there is none."""
        path = self._path(name)
        with suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
            os.utime(path)
            tensors, key = blob.mapped(path)[1], self._key(name)
            if key in self.intact or _digest(tensors) == name:  # once a process, not once a round
                self.intact.add(key)
                return tensors
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
        """Write a group that is missing, atomically: other processes may write it, too."""
        if self._has(name):
            return
        path = self._path(name)
        with writing(path), cache.filling(path) as part:
            safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, part)


def _cut(
    parameters: list[Parameter], tensors: Mapping[str, Tensor], sent: np.ndarray, head: int
) -> dict[str, Tensor]:
    """Return one group, out of packed tensors of the heads that were ``sent``: bool [heads]."""
    if head < 0:
        return {p.name: tensors[p.name] for p in parameters if p.kind is not Kind.SLICED}
    cut = {}
    for p in parameters:
        if p.kind is Kind.SLICED:
            start = sum(len(p.rows[h]) for h in np.flatnonzero(sent[:head]))
            cut[p.name] = tensors[p.name][start : start + len(p.rows[head])]
    return cut
