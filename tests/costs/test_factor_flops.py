"""FLOPs of LoRA's factors, product by product: which run, forward, on the way back and again."""

from itertools import product

import numpy as np
import pytest

from d2ft_fl.costs.flops import BranchFlops
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.subnets.schedule import Operation
from tests.costs.by_parameters import UNEVEN

T, D, ROWS, SLICES = 17, 24, 3 * 8, [12, 11, 11]
FULL, FROZEN, SHORTCUT = Operation.FULL, Operation.FROZEN, Operation.SHORTCUT


def runs_of(operation, through, inward_trains, into, out, again, drops):
    """How often products with the heads' factors and with the block's run: in near, far; out.

    ``into`` and ``out`` say whether A and B train, of the product in and of the one out.
    """
    full, live = operation is FULL, operation in (FULL, FROZEN)
    through = live and (through or operation is FROZEN)
    deep = live and (through or inward_trains)  # gradient comes to what the products in made
    into_a, into_b = (full and trains for trains in into)
    out_a, out_b = (full and trains for trains in out)
    near_in = [
        True,  # forward, B
        live and again,
        deep and (through or into_a),  # the error, through B, for A or for y
        into_b,  # gradient of B
    ]
    far_in = [True, live and again, through, into_a]  # A; the gradient of y; that of A
    near_out = [
        True,  # forward, A
        again and full and (bool(out[1]) or drops),  # what B was given is not kept
        deep,  # the gradient of z
        out_a,  # gradient of A
    ]
    far_out = [True, deep or out_a, out_b]  # B; the error, through B; the gradient of B
    return [sum(map(bool, each)) for each in (near_in, far_in, near_out, far_out)]


@pytest.mark.parametrize("frozen", ["", "A", "B"])
@pytest.mark.parametrize("targets", [("qkv",), ("proj",), ("fc1", "fc2"), ("qkv", "proj", "fc1")])
def test_which_products_run(targets, frozen):
    for again, dropout in product((False, True), (0.0, 0.1)):
        lora = Lora(rank=4, targets=targets, dropout=dropout)
        arch = with_lora(UNEVEN, lora, [(target, frozen) for target in targets])
        flops = BranchFlops.of(arch, fused=True, checkpointing=again)
        assert not flops.near[SHORTCUT].any()
        assert not flops.far[SHORTCUT].any()
        trains = frozen != "A", frozen != "B"
        for branch, (first, out) in enumerate((("qkv", "proj"), ("fc1", "fc2"))):
            rows = np.array([[ROWS] * 3, SLICES][branch])
            columns = np.array([[8] * 3, SLICES][branch])
            has_in, has_out = first in targets, out in targets
            for operation, through in product(list(Operation)[1:], (0, 1)):
                near_in, far_in, near_out, far_out = runs_of(
                    operation,
                    through,
                    has_in,  # of what is before the product out, factors alone train
                    trains if has_in else (False, False),
                    trains if has_out else (False, False),
                    again,
                    dropout > 0,
                )
                near = 2 * T * (has_in * near_in * rows + has_out * near_out * columns)
                far = 2 * T * D * (has_in * far_in + has_out * far_out)
                where = operation, through, branch
                assert flops.near[where].tolist() == near.tolist()
                assert flops.far[where] == far
