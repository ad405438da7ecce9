"""Memory of micro-batches, moment by moment, against hand arithmetic.

The small model has T = 17 tokens, D = 24, two heads of width d = 12 and slices of f = 48, two
blocks, float32 and fused attention.
"""

import math
from dataclasses import replace

import numpy as np

from d2ft_fl.costs.memory import ExampleCounts, MicroBatchMemory, Moments, examples_where
from d2ft_fl.subnets.packing import up_spec
from d2ft_fl.subnets.schedule import BranchOperations, Operation, Schedule
from tests.conftest import build, cost_model

T, D, HEAD, SLICE = 17, 24, 12, 48
STREAM = 4 * T * D
FORWARD, FROZEN, FULL = Operation.FORWARD_ONLY, Operation.FROZEN, Operation.FULL
_, ARCH = build(depth=2, num_heads=2)


def moments_of(rows, sizes=(3,), arch=ARCH, **options):
    """Return the moments of one micro-batch, rows [slots][blocks][heads]."""
    operations = np.array([rows], dtype=np.int8)
    costs = cost_model(arch, len(sizes), **options)
    ranks = np.zeros((1, arch.blocks, arch.heads), dtype=np.int64)
    checkpointing = costs.options.checkpointing
    return Moments(costs.activations, checkpointing, operations, np.array([sizes]), ranks)


def test_examples_are_summed_over_the_slots_in_which_something_is_so():
    sizes = np.array([[3, 5], [2, 0]])
    is_so = np.array([[[True, False], [True, True]], [[False, True], [True, True]]])
    assert examples_where(sizes, is_so).tolist() == [[8, 5], [0, 2]]
    assert examples_where(sizes[:, :1], is_so[:, :1]).tolist() == [[3, 0], [0, 2]]


def test_counts_of_two_slots_of_3_and_5_examples():
    rows = [[[FULL, FROZEN], [FORWARD, 0]], [[FORWARD, FULL], [FROZEN, FULL]]]
    run = BranchOperations.of(np.array([rows], dtype=np.int8), ARCH.trains)
    count = ExampleCounts(run, np.array([[3, 5]]), np.array([True, True]), None)
    attention, feed_forward = 0, 1
    assert count.total.ravel().tolist() == [8]
    assert count.most_ranks[0].tolist() == [[0, 0], [0, 0]]  # where no factor keeps anything
    assert count.full[0, 0, attention].tolist() == [3, 5]
    assert count.frozen[0, 0, feed_forward].tolist() == [0, 3]
    assert count.frozen[0, 1, attention].tolist() == [5, 0]
    assert count.live[0].tolist() == [[8, 8], [5, 5]]
    assert count.training[0].tolist() == [[8, 8], [5, 5]]
    assert count.running[0].tolist() == [[8, 8], [8, 8]]
    # Below the first block's norm nothing trains, since the embedding is frozen; but its norm does.
    assert count.through[0].tolist() == [[8, 8], [5, 5]]


def test_most_ranks_weigh_each_slot_by_its_largest_rank():
    rows = [[[FULL, FULL], [0, 0]], [[FULL, FORWARD], [0, 0]]]
    run = BranchOperations.of(np.array([rows], dtype=np.int8), ARCH.trains)
    ranks = np.array([[[2, 4], [0, 0]]])
    count = ExampleCounts(run, np.array([[3, 5]]), np.array([True, True]), ranks)
    assert count.most_ranks[0].tolist() == [[3 * 4 + 5 * 2] * 2, [0, 0]]


def test_saved_for_backward():
    """Of 3 examples: x, y, statistics of each live branch, and what heads keep."""
    saved = moments_of([[[FULL, FROZEN], [FORWARD, FROZEN]]]).saved[0]
    attention = 4 * T * 4 * HEAD + 4 * T
    one = STREAM + 8 * T + STREAM
    assert saved[0].tolist() == [3 * (one + 2 * attention), 3 * (one + 3 * 4 * T * SLICE)]
    # Nothing is FULL above: no y, and one head is live.
    upper = STREAM + 8 * T
    assert saved[1].tolist() == [3 * (upper + attention), 3 * (upper + 4 * T * SLICE)]


def test_checkpointed_only_inputs_are_saved():
    saved = moments_of([[[FULL, FULL], [FORWARD, 0]]], checkpointing=True).saved[0]
    assert saved.tolist() == [[3 * STREAM] * 2, [0, 0]]


def test_forward_without_a_graph_has_the_head_group_at_hand():
    """x, y, the sum, and of both heads products in and z."""
    forward = moments_of([[[FORWARD, FORWARD], [0, 0]]]).forward()[0]
    attention, feed_forward = 2 * 4 * T * 4 * HEAD, 2 * 4 * T * 2 * SLICE
    assert forward[0].tolist() == [3 * (3 * STREAM + attention), 3 * (3 * STREAM + feed_forward)]
    assert forward[1].tolist() == [3 * STREAM] * 2  # a skipped block has its input alone


def test_forward_with_a_graph_has_what_is_saved_and_the_sum():
    moments = moments_of([[[FULL, FULL], [FULL, FULL]]])
    assert (moments.forward() - moments.saved).tolist() == [[[3 * STREAM] * 2] * 2]


def test_forward_of_full_and_frozen_heads_has_all_that_goes_into_the_product_out():
    """Attention saves it anyway; of hidden activations FULL heads' are saved, as a copy."""
    moments = moments_of([[[FULL, FROZEN], [FULL, FULL]]])
    both = 3 * 2 * 4 * T * SLICE
    assert (moments.forward() - moments.saved)[0, 0].tolist() == [3 * STREAM, 3 * STREAM + both]


def test_forward_beside_heads_outside_the_graph_has_two_sums():
    moments = moments_of([[[FULL, FORWARD], [FULL, FULL]]])
    assert (moments.forward() - moments.saved)[0, 0].tolist() == [2 * 3 * STREAM] * 2


def test_forward_in_bfloat16_has_cast_weights():
    moments = moments_of([[[FORWARD, 0], [0, 0]]], precision="bf16")
    assert moments.cast_weights[0].tolist() == [[2 * D * 3 * HEAD, 2 * D * SLICE], [0, 0]]
    assert moments_of([[[FORWARD, 0], [0, 0]]]).cast_weights == 0


def test_backward_has_full_and_frozen_heads_together():
    """Gradients of q, k and v come twice; those of hidden activations and of z once each."""
    middle = moments_of([[[FULL, FULL], [FULL, FROZEN]]]).backward_middle()[0]
    attention, feed_forward = 4 * T * 2 * 3 * HEAD, 4 * T * 2 * SLICE
    assert middle.tolist() == [[3 * 2 * attention, 3 * 2 * feed_forward]] * 2


def test_backward_checkpointed_has_what_is_computed_again():
    """What a branch saves otherwise, and the gradient of z, held meanwhile."""
    again = moments_of([[[FULL, FULL], [0, 0]]], checkpointing=True).backward_middle()[0, 0]
    branch = 8 * T + STREAM  # statistics and y
    attention = 4 * T * (2 * 3 + 1) * HEAD + 4 * T * 4 * HEAD + 4 * T
    feed_forward = 4 * T * 2 * SLICE + 4 * T * SLICE
    assert again.tolist() == [3 * (branch + 2 * attention), 3 * (branch + 2 * feed_forward)]


def test_backward_checkpointed_holds_the_gradient_of_z_while_the_norm_goes_back():
    """Of a block with narrow middles that moment has the most: x and the sum, and z's gradient."""
    operations = np.array([[[[FULL, FROZEN]] * 2]], dtype=np.int8)
    ranks = np.zeros((1, 2, 2), dtype=np.int64)
    for rms in (False, True):
        for checkpointing in (False, True):
            costs = cost_model(ARCH, checkpointing=checkpointing)
            small = ("alive", "full", "inward", "outward", "statistics", "normed")
            narrow = {name: getattr(costs.activations, name) // 100 for name in small}
            kept = replace(costs.activations, rms=rms, **narrow)
            moments = Moments(kept, checkpointing, operations, np.array([[3]]), ranks)
            norm = STREAM + 2 * STREAM + rms * 3 * STREAM  # what arrives; x and the sum; norm
            z = checkpointing * np.array([2 * 4 * T * HEAD, 2 * 4 * T * SLICE])
            assert moments.backward()[0].tolist() == [(3 * (norm + z)).tolist()] * 2


def test_backward_has_the_gradient_that_arrives_and_those_of_x_and_y():
    moments = moments_of([[[FULL, FULL], [FORWARD, FORWARD]]])
    assert moments.backward()[0, 0].tolist() == [
        3 * STREAM + max(largest, 2 * 3 * STREAM)
        for largest in moments.backward_middle()[0, 0].tolist()
    ]
    assert moments.backward()[0, 1].tolist() == [0, 0]  # nothing is live there


NORM = 4 * (D + 2) * T + 4 * D * T  # what the final norm keeps, and what the classifier sees


def test_final_norm_and_embedding():
    moments = moments_of([[[FULL, FULL], [FULL, FULL]]], sizes=(3,))
    assert moments.outer().tolist() == [3 * (NORM + 8 + STREAM)]
    assert moments.embedding().tolist() == [3 * 3 * STREAM]


def test_many_classes_take_their_scores_three_times_and_the_gradient_of_their_weights():
    """Log-probabilities and two gradients in the loss; in the classifier one of those."""
    _, many = build(depth=2, num_heads=2, num_classes=1000)
    moments = moments_of([[[FULL, FULL], [FULL, FULL]]], arch=many)
    assert moments.outer().tolist() == [3 * (NORM + 8 + 3 * 4 * 1000)]
    assert moments.classifier().tolist() == [3 * (NORM + 8 + 4 * 1000)]
    assert moments.bytes.gradient == 4 * (D + 1) * 1000
    narrow = moments_of([[[FULL, FULL], [FULL, FULL]]], arch=many, precision="bf16")
    view = 2 * D - 4 * D * T  # of the first token, cast
    assert narrow.outer().tolist() == [3 * (NORM + view + 8 + 3 * 4 * 1000) + 2 * D * 1000]
    assert narrow.classifier().tolist() == [3 * (NORM + view + 8 + 2 * 1000)]
    assert narrow.bytes.gradient == (4 + 2) * (D + 1) * 1000


def test_slots_that_do_alike_are_one_head_group():
    """Two slots in which a head is FULL run together; a head in one slot runs with its examples."""
    together = moments_of([[[FULL, 0], [0, 0]], [[FULL, 0], [0, 0]]], sizes=(3, 5))
    each = np.array([[10, 10], [1, 1]])
    assert together.largest(True, each)[0].tolist() == [[80, 8], [0, 0]]
    apart = moments_of([[[FULL, 0], [0, 0]], [[0, FULL], [0, 0]]], sizes=(3, 5))
    assert apart.largest(True, each)[0].tolist() == [[50, 5], [0, 0]]


def test_the_peak_is_the_largest_moment():
    def peak(**changes):
        parts = {
            "saved": [[10, 20]],
            "forward": [[15, 25]],
            "backward": [[5, 6]],
            "outer": [4],
            "classifier": [1],
            "gradient": 2,
            "embedding": [3],
        }
        return MicroBatchMemory(**{k: np.array(v) for k, v in (parts | changes).items()}).peak()

    assert peak().tolist() == [10 + 20 + 6]  # backward in the upper branch
    assert peak(forward=[[15, 40]]).tolist() == [10 + 40]
    assert peak(forward=[[99, 25]]).tolist() == [99]
    assert peak(backward=[[50, 6]]).tolist() == [10 + 50]
    assert peak(outer=[40]).tolist() == [10 + 20 + 40]
    assert peak(classifier=[40]).tolist() == [10 + 20 + 40 + 2]
    assert peak(gradient=30).tolist() == [10 + 20 + 1 + 30]
    assert peak(embedding=[400]).tolist() == [400]


def test_fedprox_holds_one_copy_more_of_what_trains():
    """Beside gradient and moments, where the proximal term pulls to: as large as what goes up."""
    schedule = Schedule(np.array([[[FULL, FROZEN], [FORWARD, 0]]], dtype=np.int8))
    ranks = np.zeros((1, ARCH.blocks, ARCH.heads), dtype=np.int64)
    plain, proximal = (
        cost_model(ARCH, proximal=mu).round_memory.resident(schedule.operations[None], ranks)
        for mu in (0.0, 0.1)
    )
    trained = sum(math.prod(shape) for shape in up_spec(ARCH, schedule).values())
    assert proximal - plain == 4 * trained
