"""What options can be set to, where there are only so many values: each list has its home here.

Code that acts on a choice imports the list from here. Where a table of functions is the natural
home of the names (measures of importance, budgets that can be matched, robust aggregations), a test
holds the names there equal to those here.
"""

import math
from collections.abc import Callable

DIGITS = "digits"
MADE_UP = "made-up"
EMBEDDED_DATASETS = (DIGITS, MADE_UP)  # need no file
HUB = "hub:"  # begins the name of a data set of the Hugging Face hub
PRETRAINED = ("bundled", "hub", "none")
BAD_EXAMPLES = ("leave-out", "stop")
DATA_SELECTIONS = ("random", "entropy")

TUNINGS = ("full", "lora")  # those that come with the project; any module may be another
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")
# What learning rates are multiplied by, given the share of the rounds that are over.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}

LORA_INITS = ("lora", "federa")
MIXED_RANK_AGGREGATIONS = ("product", "stack")  # can average clients of different ranks
LORA_AGGREGATIONS = (
    "factors",
    "freeze-a",
    "alternate",
    "freeze-common",
    *MIXED_RANK_AGGREGATIONS,
)

AGGREGATIONS = ("mean", "trimmed-mean", "median", "mean-around-median")
ATTACKS = ("sign-flip", "gaussian", "label-flip", "inner-product", "alie", "min-max")
ADAPTIVE_OPTIMIZERS = ("fedadam", "fedyogi")  # divide by the root of a second moment
SERVER_OPTIMIZERS = ("mean", "fedavgm", *ADAPTIVE_OPTIMIZERS)
PLAIN_BITS = 32  # a float32 as it is: not quantized
UPLOAD_BITS = (PLAIN_BITS, 8, 4)
DOWNLOAD_BITS = (PLAIN_BITS, 8)

MATCHED_BUDGETS = ("flops", "bytes", "memory", "seconds")
PLANNERS = ("joint", "two-stage")
COUPLINGS = ("none", "spread", "agenda")
SCORES = ("magnitude", "fisher", "gradient", "taylor", "uniform")

TRANSPORTS = ("shared", "message")
FEW_REPLIES = ("stop", "repeat")
PRODUCTS = ("auto", "mkl", "onednn")  # libraries that multiply float32 on a CPU
