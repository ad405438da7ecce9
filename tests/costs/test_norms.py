"""Norms by root mean square, which torch puts together: predictions against what it counts."""

import numpy as np
import pytest

from d2ft_fl.subnets.schedule import Operation, Schedule
from tests.conftest import build, random_schedule, weights_of
from tests.costs.test_cost_model import measure

# With a narrow feed-forward layer attention takes the most.
ROWS = {
    "all full": [Operation.FULL] * 2,
    "forward alone": [Operation.FORWARD_ONLY] * 2,
    "frozen beside": [Operation.FULL, Operation.FROZEN],
    "full above": [Operation.FORWARD_ONLY, Operation.FULL],
}
POLICIES = [{"checkpointing": c, "precision": p} for c in (False, True) for p in ("fp32", "bf16")]


def narrow(**changes):
    changes = {"norm_layer": "rmsnorm", "mlp_ratio": 0.5, "num_classes": 2, **changes}
    return build(embed_dim=48, depth=2, num_heads=2, **changes)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("row", ROWS)
def test_memory_of_normed_queries_and_keys(row, policy):
    model, arch = narrow(qk_norm=True)
    operations = np.repeat(np.array([[ROWS[row]]], dtype=np.int8), 2, axis=1)
    if row == "full above":
        operations = operations.swapaxes(1, 2).copy()
    predicted, meter = measure(
        arch, weights_of(model), model, Schedule(operations), 8, batch_size=8, **policy
    )
    assert meter.flops == predicted.flops
    assert meter.peak_bytes <= predicted.memory <= 1.35 * meter.peak_bytes


@pytest.mark.parametrize("seed", [0, 3])  # each of them was once above the prediction
def test_memory_of_a_norm_on_the_way_back_through_a_checkpoint(seed):
    model, arch = build(embed_dim=48, depth=2, norm_layer="rmsnorm")
    schedule, policy = random_schedule(arch, 1, seed), {"checkpointing": True, "precision": "bf16"}
    predicted, meter = measure(arch, weights_of(model), model, schedule, 16, batch_size=8, **policy)
    assert meter.peak_bytes <= predicted.memory <= 1.1 * meter.peak_bytes
