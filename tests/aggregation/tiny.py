"""A small architecture made by hand, whose parts all differ in size, and updates of it."""

import numpy as np
import torch

from d2ft_fl.aggregation.update import Update
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter
from d2ft_fl.subnets.branches import BranchKind, BranchSpec
from d2ft_fl.subnets.packing import up_spec
from d2ft_fl.subnets.schedule import Operation, Schedule

BLOCKS, HEADS, DIM, TOKENS = 2, 3, 4, 5
IN_ROWS = ((0,), (1, 2, 5), (3, 4))  # of a product in, [6, 4]: heads lie across each other
OUT_ROWS = ((6,), (0, 1, 3, 5), (2, 4))  # of a product out, [4, 7]
SCALE = "scale.gamma"  # of the second branch; the first has none


def _of_block(b):
    return (
        Parameter(f"{b}.ask.weight", (6, DIM), Kind.SLICED, "ask.weight", b, 0, IN_ROWS),
        Parameter(f"{b}.give.weight", (DIM, 6), Kind.SLICED, "give.weight", b, 1, IN_ROWS),
        Parameter(f"{b}.rise.bias", (7,), Kind.SLICED, "rise.bias", b, 0, OUT_ROWS),
        Parameter(f"{b}.fall.weight", (DIM, 7), Kind.SLICED, "fall.weight", b, 1, OUT_ROWS),
        Parameter(f"{b}.fall.bias", (DIM,), Kind.SHARED, "fall.bias", b),
        Parameter(f"{b}.{SCALE}", (DIM,), Kind.SHARED, SCALE, b),
    )


ARCH = Architecture(
    blocks=BLOCKS,
    heads=HEADS,
    dim=DIM,
    tokens=TOKENS,
    prefix=0,
    classes=3,
    branches=(
        BranchSpec(BranchKind.ATTENTION, "norm1", ("ask",), "give", (1, 3, 2)),
        BranchSpec(BranchKind.FEED_FORWARD, "norm2", ("rise",), "fall", (1, 4, 2), scale=SCALE),
    ),
    classifier="head",
    rms=False,
    output_dropout=0.0,
    drop_path=0.0,
    embed_flops=0,
    input_elements=TOKENS,
    norm_pooled=False,
    parameters=(
        Parameter("embed", (2, DIM), Kind.EMBEDDING, trains=False),
        *_of_block(0),
        *_of_block(1),
        Parameter("head.weight", (3, DIM), Kind.FINAL),
        Parameter("head.bias", (3,), Kind.FINAL),
    ),
)
FULL, FORWARD, SKIP = Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT


def ramp(shape, step=0.25, first=0.25):
    """Numbers that all differ, and that float32 has exactly: first, first + step, ..."""
    count = int(np.prod(shape))
    return (first + step * torch.arange(count, dtype=torch.float64)).float().view(shape)


WEIGHTS = {p.name: ramp(p.shape) for p in ARCH.parameters}


def schedule(*slots):
    """Slots of blocks of heads."""
    return Schedule(np.array(slots, dtype=np.int8))


EVERYTHING = schedule([[FULL] * HEADS] * BLOCKS)


def packed_old(own, name):
    """What a client began with of a parameter that it trains, packed as it comes back."""
    p = ARCH.by_name[name]
    heads = own.heads(own.trained, p.block)
    return p.pack(WEIGHTS[name], heads) if p.kind is Kind.SLICED else WEIGHTS[name].clone()


def update(own, examples, change, **options):
    """What a client sends whose values have all moved by ``change``, times 1, 2, 3 ... by row."""
    sent = {}
    for name, shape in up_spec(ARCH, own).items():
        rows = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
        sent[name] = packed_old(own, name) + change * rows
    return Update(own, examples, sent, **options)


def with_one(own, examples, name, value):
    """What a client sends that has changed one number, the first of a parameter, to a value."""
    sent = {n: packed_old(own, n) for n in up_spec(ARCH, own)}
    sent[name].view(-1)[0] = value
    return Update(own, examples, sent)
