"""Bytes of the activations of one example, by what they belong to.

With elements of c bytes (4, or 2 in bfloat16), T tokens, model width D, head width d and a
feed-forward slice of width f, an example leaves for the backward pass

    each of a block's two branches          4 T D + 8 T             x, statistics of the norm
    where the branch trains anything        c T D                   y (+ c T D with layer scale)
    a FULL or FROZEN subnet                 c T (4 d + f) + 4 T     q, k, v, output; log-sum; hidden
    a FULL one besides                      c T f                   activated hidden

Under LoRA a product with factors keeps c T r for the gradient of the factor on the far side of it,
with r the largest rank of what is FULL in a slot; y and z (what goes into the product out) stay
only for the gradient of an A.
"""

from dataclasses import dataclass

import numpy as np

from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.subnets.architecture import Architecture
from d2ft_fl.subnets.branches import BranchSpec, Trains
from d2ft_fl.wire.sizes import ELEMENT


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that the activations of one example take.

    Attributes:
        stream: One [tokens, dim] tensor in float32: the residual stream.
        embedded: The residual stream of all tokens, before any are left out.
        narrow: One [tokens, dim] tensor in the type of products.
        statistics: Of one norm, per live example.
        normed: What a root mean square norm keeps besides, to train its weight.
        alive: Kept by a FULL or FROZEN subnet that gradient goes through: int64 [2, heads], of both
            branches.
        full: Kept besides by a FULL subnet: int64 [2, heads].
        shallow: Kept by a FULL subnet in place of ``alive`` and ``full``, where no gradient goes
            through it: int64 [2, heads].
        ranked: Kept by a branch with something FULL for LoRA's gradients, per rank: int64 [2].
        masked: Kept by a branch with something FULL, whatever the rank, where LoRA drops out:
            int64 [2].
        dropped: Kept by a FULL subnet where LoRA drops out: int64 [2, heads].
        near: What a product with LoRA's factors has in between for a moment, per rank: int64 [2].
        drops: What a product with LoRA's factors has for a moment where LoRA drops out, whatever
            the rank: int64 [2].
        keeps_y: Whether y is kept where something is FULL: bool [2].
        trains: What trains of each branch.
        inward: Outputs of a head's products in: int64 [2, heads].
        outward: What a head's middle makes for its product out: int64 [2, heads].
        result: What goes into a head's product out: int64 [2, heads].
        saves_result: Whether the middle itself saves that: bool [2].
        besides: What attention that is not fused, or queries and keys that are normed in float32,
            have besides for a moment, when they run without a graph, with one, and on the way back:
            int64 [3, 2, heads].
        weights: Weights of a head's products in, in the type of products: int64 [2, heads]; once a
            micro-batch, not per example.
        outer: Kept by the final norm.
        scores: One tensor of the classifier's scores.
        cast_scores: The same in the type of products, where that is another.
        classifier: Of the classifier's weight, once a micro-batch, where it is cast.
        gradient: Of the classifier's gradient, once a micro-batch, which is made anew before it is
            added to the one that is held; and in the type of products before that.
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
    inward: np.ndarray
    outward: np.ndarray
    result: np.ndarray
    saves_result: np.ndarray
    besides: np.ndarray
    weights: np.ndarray
    outer: int
    scores: int
    cast_scores: int
    classifier: int
    gradient: int
    scaled: bool
    rms: bool
    mask: int
    regraded: int

    @property
    def casts(self) -> bool:
        """Whether products are in bfloat16, to which weights are cast as well."""
        return self.narrow != self.stream

    @classmethod
    def of(
        cls, a: Architecture, options: TrainingOptions, fused: bool, device: str, embedded: int
    ) -> "ActivationBytes":
        """Count the bytes of an architecture's activations.

        Args:
            a: The architecture, with as many tokens as blocks see.
            options: Precision.
            fused: Whether attention is torch's fused one.
            device: ``cpu`` or ``cuda``.
            embedded: Tokens of an example before any are left out.
        """
        c = 2 if options.precision == "bf16" else ELEMENT
        cast = c * (c < ELEMENT)  # bytes of an element beside those in float32
        mask = 1 if device == "cuda" else c  # bytes that dropout keeps of an element
        t = a.tokens
        widest = [np.max(rows, axis=0) for rows in rows_in(a)]  # of products in: [heads]
        full, shallow = kept_by_full(a, c)
        lora = [
            LoraActivations.of(a, c, *branch)
            for branch in zip(a.branches, a.trains, shallow, strict=True)
        ]
        keeps_z = np.array([branch.keeps_z for branch in lora])[:, None]
        inward, outward = middle_ends(a, c, device)
        return cls(
            stream=ELEMENT * t * a.dim,
            embedded=ELEMENT * embedded * a.dim,
            narrow=c * t * a.dim,
            statistics=2 * ELEMENT * t,
            normed=a.rms * ELEMENT * t * a.dim * a.trains[0].norm,
            alive=kept_by_live(a, c, fused, mask),
            full=full * keeps_z,
            shallow=shallow * keeps_z,
            ranked=np.array([branch.ranked for branch in lora], dtype=np.int64),
            masked=np.array([branch.masked for branch in lora], dtype=np.int64),
            dropped=np.stack([branch.dropped for branch in lora]),
            near=np.array([branch.near for branch in lora], dtype=np.int64),
            drops=np.array([branch.drops for branch in lora], dtype=np.int64),
            keeps_y=np.array([branch.keeps_y for branch in lora]),
            trains=a.trains,
            inward=inward,
            outward=outward,
            result=shallow,
            saves_result=np.array([branch.saves_result for branch in a.branches]),
            besides=normed_moments(a, c) if fused else unfused_moments(a, c),
            weights=c * a.dim * np.stack(widest),
            outer=final_norm(a, c) + 2 * ELEMENT,  # the label, of 8 bytes
            scores=ELEMENT * a.classes,
            cast_scores=cast * a.classes,
            classifier=cast * a.dim * a.classes,
            gradient=(ELEMENT + cast) * (a.dim + 1) * a.classes,
            scaled=a.trains[0].scale,
            rms=a.rms,
            mask=mask * t * a.dim * bool(a.output_dropout),
            regraded=t * a.dim * ((c - mask) * bool(a.output_dropout) + c * bool(a.drop_path)),
        )

    def spared_at_the_bottom(self, frozen: bool, checkpointing: bool, slots: int) -> int:
        """Return most bytes of an example that the lowest block that trains in a slot spares.

        That is beside what the same operations keep above another block that trains. Of a branch's
        input all examples are kept or none: a block that is the lowest of one slot, and runs in no
        other, spares the input of all. So inputs count once for each slot.

        Args:
            frozen: Whether subnets may be FROZEN.
            checkpointing: Whether activations are computed again.
            slots: Whose lowest blocks may be different ones.
        """
        lowest = [t.anything for t in self.trains].index(True)
        whole, trains = self.alive + self.full, self.trains[lowest]
        # Of a branch in which nothing trains, and of the one that is lowest.
        spared = slots * (lowest + (not checkpointing)) * self.stream
        if not checkpointing:
            spared += (lowest + 1) * self.statistics + int(whole[:lowest].sum())
            if frozen or not trains.inward:
                spared += int(whole[lowest].sum())
        return spared


def kept_by_live(a: Architecture, c: int, fused: bool, mask: int) -> np.ndarray:
    """Count what a FULL or FROZEN subnet keeps of an example: bytes, int64 [2, heads].

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.
        fused: Whether attention is torch's fused one.
        mask: Bytes that dropout keeps of an element.
    """
    attends, feeds = a.branches
    t, d, hidden = a.tokens, attends.head_width, np.array(feeds.widths, dtype=np.int64)
    into_attention, into_middle = (np.sum(rows, axis=0) for rows in rows_in(a))
    # Queries, keys, values and the output; where there is a gate, it is kept in its place below.
    attention = c * t * (into_attention + (not attends.gated) * d)
    if fused:
        attention += ELEMENT * t  # log-sum
    else:  # in float32: scaled q and k; weights, with dropout their mask and product
        drops, cast = bool(attends.dropout), c < ELEMENT
        attention += (2 + cast) * ELEMENT * t * d + (1 + 2 * drops) * ELEMENT * t * t
    attention += attends.head_norms * (c * t * d + 2 * ELEMENT * t)  # what was normed
    attention += normed_apart(a, c) * ELEMENT * t * d
    attention += 2 * c * t * d * attends.gated  # before and behind the sigmoid
    kept = into_middle + feeds.gated * hidden  # a gate is kept before and behind the activation
    feed_forward = c * t * kept + mask * t * hidden * bool(feeds.dropout)
    return np.stack([attention, feed_forward])


def kept_by_full(a: Architecture, c: int) -> tuple[np.ndarray, np.ndarray]:
    """Count what a FULL subnet keeps of z, the input of its product out, where an A or W trains.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.

    Returns:
        Bytes of an example where gradient goes through the subnet, and where none does: int64
        [2, heads] each. Normed heads lie otherwise in memory, so that the product out takes a copy;
        a root mean square norm keeps what it made before its weight, in float32.
    """
    attends, feeds = a.branches
    t, d, hidden = a.tokens, attends.head_width, np.array(feeds.widths, dtype=np.int64)
    one = np.ones(a.heads, dtype=np.int64)
    copies = c * (attends.gated + bool(attends.head_norms)) + ELEMENT * a.rms * attends.head_norms
    full = np.stack([t * d * copies * one, c * t * hidden])
    shallow = np.stack([c * t * d * one, c * t * hidden])
    return full, shallow


def normed_apart(a: Architecture, c: int) -> int:
    """Count the norms of heads that see a copy in float32 of what products in made.

    That is how torch does a root mean square norm of bfloat16 with a weight of float32.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.
    """
    return a.branches[0].head_norms * a.rms * (c < ELEMENT)


def normed_moments(a: Architecture, c: int) -> np.ndarray:
    """Count what norms of heads in float32 have for a moment, beside what is kept.

    Without a graph that is three tensors in float32, while what is counted of the middle, three
    tensors in the type of products, is not there yet. With a graph both are within what is kept.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.

    Returns:
        Bytes of an example and head, without a graph, with one, and on the way back: int64
        [3, 2, heads].
    """
    moments = np.zeros((3, 2, a.heads), dtype=np.int64)
    width = a.branches[0].head_width * bool(normed_apart(a, c))
    moments[0, 0] = 3 * (ELEMENT - c) * a.tokens * width
    return moments


def unfused_moments(a: Architecture, c: int) -> np.ndarray:
    """Count what attention that is not fused has for a moment, beside what it keeps.

    Before the weights there is what they are the softmax of; on the way back there are gradients of
    both.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.

    Returns:
        Bytes of an example and head, without a graph, with one, and on the way back: int64
        [3, 2, heads].
    """
    attends = a.branches[0]
    drops, cast = bool(attends.dropout), c < ELEMENT
    square, wide = ELEMENT * a.tokens**2, ELEMENT * a.tokens * attends.head_width
    moments = np.zeros((3, 2, a.heads), dtype=np.int64)
    moments[0, 0] = max(2 * wide + square, (2 + drops) * square) + cast * 4 * wide
    moments[1, 0] = (1 - drops) * square
    moments[2, 0] = (2 - drops) * square + cast * 4 * wide
    return moments


def middle_ends(a: Architecture, c: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Count what goes into a head's middle, and what its middle makes for its product out.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.
        device: ``cpu`` or ``cuda``.

    Returns:
        Bytes of an example: int64 [2, heads] each.
    """
    attends, feeds = a.branches
    t, d, hidden = a.tokens, attends.head_width, np.array(feeds.widths, dtype=np.int64)
    masks = (2 if device == "cpu" else 1) * bool(feeds.dropout)  # mask and product
    # Normed and copied; gate and product.
    extras = attends.head_norms + bool(attends.head_norms) + 2 * attends.gated
    attention = np.full(a.heads, c * t * d * (1 + extras))
    inward = np.stack([c * t * np.sum(rows, axis=0) for rows in rows_in(a)])
    outward = np.stack([attention, c * t * hidden * (1 + masks + feeds.gated)])
    return inward, outward


def rows_in(a: Architecture) -> list[list[np.ndarray]]:
    """Return the rows of a head's products in: of each branch and product, int64 [heads]."""
    return [list(a.rows_in(branch).values()) for branch in range(len(a.branches))]


def final_norm(a: Architecture, c: int) -> int:
    """Count what the final norm keeps of an example: its input, and the classifier's view of it.

    Args:
        a: The architecture.
        c: Bytes of an element in the type of products.
    """
    kept = ELEMENT * (a.dim * (1 + a.rms) + 2) * (1 if a.norm_pooled else a.tokens)
    return kept + c * a.dim * (1 if a.norm_pooled or c < ELEMENT else a.tokens)


@dataclass(frozen=True)
class LoraActivations:
    """What a branch's activations take as far as that depends on LoRA's factors.

    The attributes, but for ``keeps_z``, are a branch's part of those of :class:`ActivationBytes`.

    Attributes:
        ranked: Bytes per rank.
        masked: Bytes whatever the rank.
        dropped: Bytes of a FULL subnet: int64 [heads].
        near: Bytes for a moment, per rank.
        drops: Bytes for a moment, whatever the rank.
        keeps_y: Whether y is kept where something is FULL.
        keeps_z: Whether z, the input of the product out, is kept of what is FULL.
    """

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
    ) -> "LoraActivations":
        """Count the bytes of one branch.

        Args:
            a: The architecture.
            c: Bytes of an element in the type of products.
            spec: What the branch consists of.
            trains: What of it trains.
            z: Bytes of the input of the product out, of an example: int64 [heads].
        """
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
