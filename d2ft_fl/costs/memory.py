"""What a pass, forward and backward, takes in memory beyond what is held before it.

**Saved for backward**, in a pass with N examples, n_l of them live in the block (something FULL or
FROZEN), n_t training in it (something FULL), with elements of c bytes (4, or 2 in bfloat16):

    a block's two branches, each   4 N T D + 8 n_l T + c n_t T D    x, statistics, y
                                   (+ c N T D with layer scale, where anything trains)
    a FULL or FROZEN subnet        c T (4 d + f) + 4 T              q, k, v, output; log-sum; hidden
    a FULL one besides             c T f                            activated hidden

which is 4 + 12 = 16 units of T D for a usual block with everything FULL, 4 of them with the first
FULL subnet: that is why opening a block is a charge of its own. Head norms, gates, dropout, and
attention that is not fused and has matrices [T, T], add what ``Saved`` says.
Checkpointed, only x stays.

Under LoRA a product with factors keeps c n_t T r for the gradient of the factor on the far side of
it, with r the largest rank of what is FULL in a slot; y and z stay only for the gradient of an A;
and the lowest branch that trains keeps neither x nor, where nothing before its product out trains,
what its subnets have in the middle.

**Transients** come on top. The peak of a pass is the largest of what is alive at these moments,
with a stream for one tensor [N, T, D]:

* forward in a branch: what lower branches saved, x, y, the sum, and for the piece at hand its
  products in and its z (saved or not);
* backward in a branch: what it and lower ones saved, the gradient that arrives, the gradient of y,
  and for all FULL pieces, then all FROZEN ones, the gradients of z and of products in (of q, k, v
  twice, when they are put together);
* after it: the gradient of x in place of the pieces';
* the classifier, with everything saved; the embedding, with nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.engine.grouping import Part, groups, storage_order
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.branches import BranchSpec, Trains
from d2ft_fl.subnets.schedule import BranchOperations, Operation, effective
from d2ft_fl.wire.sizes import ELEMENT


@dataclass(frozen=True)
class Saved:
    """Bytes that one example leaves for the backward pass, by what they belong to.

    Attributes:
        stream: One [tokens, dim] tensor in float32: the residual stream.
        embedded: The same of all tokens, before any are left out.
        narrow: The same in the type of products.
        statistics: Of one norm, per live example.
        normed: What a root mean square norm keeps besides, to train its weight.
        alive: Of a FULL or FROZEN subnet that gradient goes through: int64 [2 branches, heads].
        full: Of a FULL one besides. shallow: In its place, where none goes through it.
        ranked: Of a block with something FULL, for LoRA's gradients, by rank: int64 [2 branches].
        masked: Of the same, whatever the rank, where LoRA drops out: int64 [2 branches].
        dropped: Of a FULL subnet, where LoRA drops out: int64 [2 branches, heads].
        near: What a product with LoRA's factors has in between, by rank: int64 [2 branches].
        drops: Besides, whatever the rank, where LoRA drops out: int64 [2 branches].
        keeps_y: Whether y is kept where something is FULL: bool [2 branches].
        trains: What trains of each branch.
        hidden: What goes into a piece's middle, and what comes out: int64 [2, 2, heads].
        within: What plain attention, which is not fused, has besides for a moment: run without a
            graph, with one, and on the way back: int64 [3, 2, heads].
        weights: Of a product in, in the type of products: int64 [2, heads]; not per example.
        outer: Of final norm, classifier and loss.
        classifier: Of the classifier's weight, once a pass, where it is cast.
        scaled: Whether a layer scale keeps the sum.
        rms: Whether norms are by root mean square, which torch puts together from simple steps.
        mask: Of dropout on the sum, where there is one.
        regraded: Gradients of the sum beside the one that arrives, where it is dropped in parts or
            whole; less the mask, which is gone by then.
    """

    stream: int
    embedded: int
    narrow: int
    statistics: int
    normed: int
    alive: np.ndarray
    full: np.ndarray
    shallow: np.ndarray
    ranked: np.ndarray
    masked: np.ndarray
    dropped: np.ndarray
    near: np.ndarray
    drops: np.ndarray
    keeps_y: np.ndarray
    trains: tuple[Trains, ...]
    hidden: np.ndarray
    within: np.ndarray
    weights: np.ndarray
    outer: int
    classifier: int
    scaled: bool
    rms: bool
    mask: int
    regraded: int

    @classmethod
    def of(
        cls, a: Architecture, options: TrainingOptions, fused: bool, device: str, embedded: int
    ) -> "Saved":
        """By architecture and precision; see the module's docstring.

        Args:
            embedded: Tokens of an example before any are left out.
        """
        c = 2 if options.precision == "bf16" else ELEMENT
        attends, feeds = a.branches
        rows = [list(a.rows_in(branch).values()) for branch in range(len(a.branches))]
        into = [np.sum(of_branch, axis=0) for of_branch in rows]  # columns of all products in
        t, d, hidden = a.tokens, attends.head_width, np.array(feeds.widths, dtype=np.int64)
        one = np.ones(a.heads, dtype=np.int64)
        attended = into[0] + (not attends.gated) * d  # queries, keys, values, output
        attention = c * t * attended + ELEMENT * t
        within = np.zeros((3, 2, a.heads), dtype=np.int64)
        if not fused:  # in float32: scaled q and k; weights, with dropout their mask and product
            drops, square, wide = bool(attends.dropout), ELEMENT * t * t, ELEMENT * t * d
            cast = c < ELEMENT
            attention = c * t * attended + (2 + cast) * wide + (1 + 2 * drops) * square
            # Before the weights there is what they are the softmax of; on the way back there are
            # gradients of both.
            within[0, 0] = max(2 * wide + square, (2 + drops) * square) + cast * 4 * wide
            within[1, 0] = (1 - drops) * square
            within[2, 0] = (2 - drops) * square + cast * 4 * wide
        attention += attends.head_norms * (c * t * d + 2 * ELEMENT * t)  # what was normed
        attention += 2 * c * t * d * attends.gated  # before and behind the sigmoid
        mask = 1 if device == "cuda" else c  # bytes that dropout keeps of an element
        kept = into[1] + feeds.gated * hidden  # a gate is kept before and behind the activation
        out = [attention * one, c * t * kept + mask * t * hidden * bool(feeds.dropout)]
        # Normed heads lie otherwise in memory, so that the product out takes a copy.
        copies = attends.gated + bool(attends.head_norms) + a.rms * attends.head_norms
        full = [c * t * d * copies * one, c * t * hidden]
        shallow = [c * t * d * one, c * t * hidden]
        each = zip(a.branches, a.trains, shallow, strict=True)
        lora = [_LoraSaved.of(a, c, *branch) for branch in each]
        for branch, own in enumerate(lora):
            if not own.keeps_z:
                full[branch], shallow[branch] = 0 * one, 0 * one
        inward = [c * t * columns for columns in into]
        masks = (2 if device == "cpu" else 1) * bool(feeds.dropout)  # mask and product
        masks += feeds.gated
        # Normed and copied; gate and product.
        extras = attends.head_norms + bool(attends.head_norms) + 2 * attends.gated
        outward = [c * t * d * (1 + extras) * one, c * t * hidden * (1 + masks)]
        # Final norm: its input, and what the classifier's view of its output keeps alive.
        norm = ELEMENT * (a.dim * (1 + a.rms) + 2) * (1 if a.norm_pooled else t)
        norm += c * a.dim * (1 if a.norm_pooled or c < ELEMENT else t)
        return cls(
            stream=ELEMENT * t * a.dim,
            embedded=ELEMENT * embedded * a.dim,
            narrow=c * t * a.dim,
            statistics=2 * ELEMENT * t,
            normed=a.rms * ELEMENT * t * a.dim * a.trains[0].norm,
            alive=np.stack(out),
            full=np.stack(full),
            shallow=np.stack(shallow),
            ranked=np.array([own.ranked for own in lora], dtype=np.int64),
            masked=np.array([own.masked for own in lora], dtype=np.int64),
            dropped=np.stack([own.dropped for own in lora]),
            near=np.array([own.near for own in lora], dtype=np.int64),
            drops=np.array([own.drops for own in lora], dtype=np.int64),
            keeps_y=np.array([own.keeps_y for own in lora]),
            trains=a.trains,
            hidden=np.stack([np.stack(inward), np.stack(outward)], axis=1),
            within=within,
            weights=c * a.dim * np.stack([np.max(of_branch, axis=0) for of_branch in rows]),
            outer=norm + ELEMENT * (2 * a.classes + 2),
            classifier=c * a.dim * a.classes * (c < ELEMENT),
            scaled=a.trains[0].scale,
            rms=a.rms,
            mask=mask * t * a.dim * bool(a.output_dropout),
            regraded=t * a.dim * ((c - mask) * bool(a.output_dropout) + c * bool(a.drop_path)),
        )

    def spared_at_the_bottom(self, frozen: bool, checkpointing: bool) -> int:
        """Most bytes of an example that the lowest block that trains in a slot does not keep.

        That is beside what the same operations keep above another block that trains.

        Args:
            frozen: Whether subnets may be FROZEN.
        """
        lowest = [t.anything for t in self.trains].index(True)
        whole, own = self.alive + self.full, self.trains[lowest]
        spared = lowest * self.stream  # of a branch in which nothing trains
        if not checkpointing:
            spared += self.stream + (lowest + 1) * self.statistics + int(whole[:lowest].sum())
            if frozen or not own.inward:
                spared += int(whole[lowest].sum())
        return spared


@dataclass(frozen=True)
class _LoraSaved:
    """A branch's part of :class:`Saved`, as far as it depends on factors; see there."""

    ranked: int
    masked: int
    dropped: np.ndarray
    near: int
    drops: int
    keeps_y: bool
    keeps_z: bool

    @classmethod
    def of(
        cls, a: Architecture, c: int, spec: BranchSpec, trains: Trains, z: np.ndarray
    ) -> "_LoraSaved":
        """With elements of c bytes, and so many bytes of z an example and head."""
        into, out = (target in a.targets for target in spec.targets)
        drops_in, drops_out = into and a.lora_dropout > 0, out and a.lora_dropout > 0
        kept = c * a.tokens * (trains.near[0] + trains.far[1])
        masked = a.tokens * a.dim * (c * trains.far[0] + 1)  # y, and where it was dropped
        return cls(
            ranked=kept,
            masked=drops_in * masked,
            dropped=drops_out * (c * trains.near[1] + 1) * z // c,
            near=c * a.tokens * (into + out),
            drops=c * a.tokens * 2 * a.dim * (drops_in + drops_out),
            keeps_y=trains.y and not drops_in,
            keeps_z=trains.z and not drops_out,
        )


@dataclass(frozen=True)
class PassMemory:
    """Memory of passes, branch by branch from the first: int64 [passes, 2 blocks] bytes each.

    Attributes:
        saved: Kept for backward.
        forward: On the way forward, at most, beside what lower branches saved.
        backward: On the way back, at most, beside what this and lower branches saved.
        outer: In the classifier, beside what all branches saved: [passes].
        embedding: In the embedding, at most: [passes].
    """

    saved: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    outer: np.ndarray
    embedding: np.ndarray

    @classmethod
    def of(
        cls,
        s: Saved,
        checkpointing: bool,
        operations: np.ndarray,
        sizes: np.ndarray,
        ranks: np.ndarray,
    ) -> "PassMemory":
        """Work it out, for many passes at once.

        Args:
            s: What an example saves.
            operations: int8 [passes, slots, blocks, heads].
            sizes: int64 [passes, slots], examples of each slot.
            ranks: Of heads that train, else 0: int64 [passes, blocks, heads].
        """
        n = sizes
        run = BranchOperations.of(operations, s.trains)
        inward_trains = np.array([t.inward for t in s.trains])
        total = n.sum(axis=1)[:, None, None]  # [passes, 1, 1], beside [passes, blocks, 2]
        resident = (operations != Operation.SHORTCUT).any(axis=1)
        full, frozen = run.operations == Operation.FULL, run.operations == Operation.FROZEN
        live, trains = (full | frozen).any(axis=4), full.any(axis=4)  # [passes, slots, blocks, 2]
        n_full = _examples(n, full)  # [passes, blocks, 2, heads]
        n_deep = _examples(n, full & (run.through | inward_trains)[..., None])
        n_frozen = _examples(n, frozen)
        n_live, n_trains = _examples(n, live), _examples(n, trains)  # [passes, blocks, 2]
        n_through = _examples(n, live & run.through)
        n_runs = _examples(n, (run.operations != Operation.SHORTCUT).any(axis=4))
        rank = ranks.max(axis=2)[..., None]  # [passes, blocks, 1]
        near = s.near * rank + s.drops * (rank > 0)
        # Of what LoRA keeps: of the slots in which something is FULL, the largest rank of that.
        factors = s.masked * n_trains
        if s.ranked.any():
            most = (full * ranks[:, None, :, None]).max(axis=4)  # [passes, slots, blocks, 2]
            factors = factors + s.ranked * _examples(n, most)
        cast = s.narrow != s.stream

        kept = total * ((n_live if checkpointing else n_through) > 0)  # x, of all examples
        saved = s.stream * kept
        saved += total * (s.narrow * s.scaled * (n_trains > 0) + s.mask * (n_live > 0))
        if not checkpointing:
            saved += s.statistics * n_through + (s.narrow * s.keeps_y + s.normed) * n_trains
            saved += factors + (n_full * s.dropped).sum(axis=3)
            saved += ((n_deep + n_frozen) * s.alive + n_deep * s.full).sum(axis=3)
            saved += ((n_full - n_deep) * s.shallow).sum(axis=3)

        def largest(
            operation: Operation, per_head: np.ndarray, together: bool = False
        ) -> np.ndarray:
            """Bytes [2, heads] an example and head, for the largest piece: [passes, blocks, 2]."""
            return _largest(run, operations, operation, n, per_head, together)

        inward, outward = s.hidden[:, 0], s.hidden[:, 1]  # [2, heads]
        bare, graphed, returning = s.within
        ahead = largest(Operation.FORWARD_ONLY, inward + outward + bare)
        live_ahead = inward + outward + bare if checkpointing else graphed
        if live_ahead.any():
            for operation in (Operation.FULL, Operation.FROZEN):
                ahead = np.maximum(ahead, largest(operation, live_ahead))
        # The weights of a product are cast for as long as it takes.
        casts = resident @ s.weights.T if cast else np.int64(0)
        # What is not kept; and for a moment, before it is cast, once more as it was.
        kept_y = n_trains * s.keeps_y * (not checkpointing)
        y = s.narrow * (n_runs - kept_y)
        ahead = np.maximum(ahead + casts, cast * s.stream * n_runs)
        stream = s.stream * (total - kept)  # where x is not saved it is there all the same
        forward = saved + ahead + stream + (n_runs > 0) * (y + total * s.narrow) + near * n_runs

        # q, k and v get their gradients one by one and are then put together.
        back = inward * np.array([[2], [1]]) + outward
        again = back + s.alive if checkpointing else back
        middle = np.maximum(
            largest(Operation.FULL, again, together=True),
            largest(Operation.FROZEN, again, together=True),
        )
        if returning.any():  # one piece after the other
            alone = [largest(o, returning) for o in (Operation.FULL, Operation.FROZEN)]
            middle = middle + np.maximum(*alone)
        if checkpointing:
            middle = middle + (s.statistics + s.narrow + s.normed) * n_live
            middle = middle + factors + (n_full * s.dropped).sum(axis=3)
        arriving = total * (s.stream * (1 + s.scaled) + s.narrow * cast + s.regraded)
        own = (s.narrow + s.stream * 3 * s.rms) * n_through + near * n_live
        after = 2 * total * s.stream * (n_through > 0)
        backward = (n_live > 0) * (arriving + own + np.maximum(middle + casts, after))
        micro_batches = len(n)
        ends = total[:, 0, 0]
        return cls(
            saved.reshape(micro_batches, -1),
            forward.reshape(micro_batches, -1),
            backward.reshape(micro_batches, -1),
            ends * (s.outer + s.stream * (1 + 3 * s.rms)) + s.classifier,
            3 * ends * s.embedded,
        )

    def peak(self) -> np.ndarray:
        """The most that is alive at once: int64 [passes]."""
        below = np.cumsum(self.saved, axis=1) - self.saved
        moments = np.maximum(below + self.forward, below + self.saved + self.backward).max(axis=1)
        return np.maximum(np.maximum(moments, self.saved.sum(axis=1) + self.outer), self.embedding)


def _examples(n: np.ndarray, what: np.ndarray) -> np.ndarray:
    """Examples of the slots [passes, slots] in which something is so: [passes, slots, ...]."""
    if n.shape[1] == 1:
        return what[:, 0] * n.reshape(-1, *[1] * (what.ndim - 2))
    return np.einsum("ps,ps...->p...", n, what.astype(np.int64))


def _largest(
    run: BranchOperations,
    operations: np.ndarray,
    operation: Operation,
    n: np.ndarray,
    per_head: np.ndarray,
    together: bool,
) -> np.ndarray:
    """Bytes of an operation's largest piece, of each block and branch: int64 [passes, blocks, 2].

    Args:
        run, operations: Of passes, by branch and as planned [passes, slots, blocks, heads].
        n: Examples [passes, slots]. per_head: Bytes of an example and head: int64 [2, heads].
        together: Take the pieces of a segment as one.
    """
    if n.shape[1] == 1:  # one slot is one piece
        return n[..., None] * ((run.operations[:, 0] == operation) * per_head).sum(axis=3)
    found = np.zeros((len(n), operations.shape[2], 2), dtype=np.int64)
    stored = effective(operations)
    for index, block, branch in np.ndindex(found.shape):
        column = run.operations[index, :, block, branch]
        through = run.through[index, :, block, branch]
        order = stored[index, :, block]
        for head_groups in _head_groups(
            column.tobytes(), through.tobytes(), order.tobytes(), n.shape[1], operation
        ):
            loads = [
                int(n[index, start:stop].sum()) * int(per_head[branch, list(heads)].sum())
                for start, stop, heads in head_groups
            ]
            load = sum(loads) if together else max(loads)
            found[index, block, branch] = max(int(found[index, block, branch]), load)
    return found


@lru_cache(maxsize=1 << 16)
def _head_groups(
    operations: bytes, through: bytes, stored: bytes, slots: int, operation: Operation
) -> list[list[Part]]:
    """The engine's pieces of one operation, segment by segment: of a branch's [slots, heads]."""

    def table(data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.int8).reshape(slots, -1)

    wanted = np.frombuffer(through, dtype=bool)
    found = groups(table(operations), wanted, storage_order(table(stored)))
    return [group.head_groups[operation] for group in found if group.head_groups[operation]]
