"""The engine on a GPU: same results, no waiting, memory as predicted."""

import pytest
import torch
import torch.nn.functional as F

from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.probes import probe_scores
from d2ft_fl.engine.trainer import Stepper, train
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.planning.importance import MEASURED
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.tasks.task import Batch
from d2ft_fl.util.torch_device import warm_up
from tests.conftest import (
    CLASSIFY,
    all_of,
    build,
    cost_model,
    images_for,
    learning_rate,
    random_schedule,
    training_options,
    weights_of,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
CUDA = torch.device("cuda")
WIDE = {"img_size": 64, "embed_dim": 128, "num_heads": 4, "depth": 4}  # heads of 32: fused


def ready(schedule, model, arch, options, device=CUDA):
    warm_up(device)
    partial = PartialModel(TimmViT(model), arch, Numerics.of(options), device)
    partial.reset(schedule, pack_for(arch, weights_of(model), schedule))
    return partial


def data(arch, count, device=CUDA):
    images, labels = images_for(arch, count, side=64)
    return images.to(device), labels.to(device)


@pytest.mark.parametrize("seed", range(4))
def test_a_round_is_the_cpus_up_to_rounding(seed):
    model, arch = build(**WIDE)
    schedule = random_schedule(arch, 3, seed)
    options = training_options(batch_size=8, optimizer="sgd", lr=0.05, head_lr=0.05)
    updates = []
    for device in (torch.device("cpu"), CUDA):
        partial = ready(schedule, model, arch, options, device)
        images, labels = data(arch, 16, device)
        batches = (Batch(images[i : i + 8], labels[i : i + 8]) for i in (0, 8))
        train(partial, batches, CLASSIFY, options, learning_rate, Meter(device=device))
        updates.append(partial.update())
    for name, tensor in updates[0].items():
        torch.testing.assert_close(updates[1][name].cpu(), tensor, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_torchs_autocast():
    model, arch = build(**WIDE)
    model.to(CUDA)
    images, labels = data(arch, 8)
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(images)
    partial = PartialModel(TimmViT(model), arch, Numerics(torch.bfloat16), CUDA)
    partial.reset(all_of(arch), pack_for(arch, weights_of(model), all_of(arch)))
    torch.testing.assert_close(partial(images, [8]), expected, rtol=0.05, atol=0.02)
    F.cross_entropy(partial(images, [8]).float(), labels).backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slots", [1, 3])
def test_counted_equals_predicted(precision, checkpointing, slots):
    """FLOPs exactly; the allocator's peak within a tenth of the prediction."""
    model, arch = build(**WIDE)
    schedule = random_schedule(arch, slots, 5)
    options = {"batch_size": 32, "precision": precision, "checkpointing": checkpointing}
    costs = cost_model(arch, slots, **options)
    costs = type(costs)(arch, costs.options, slots, "cuda")
    partial = ready(schedule, model, arch, costs.options)
    images, labels = data(arch, 96)
    batches = (Batch(images[i : i + 32].clone(), labels[i : i + 32]) for i in range(0, 96, 32))
    meter = Meter(verify=True, device=CUDA)
    train(partial, batches, CLASSIFY, costs.options, learning_rate, meter)
    predicted = costs.cost(schedule, 96)
    assert meter.flops == predicted.flops
    assert meter.peak_bytes == pytest.approx(predicted.memory, rel=0.1)


def test_nothing_waits_for_the_gpu():
    """torch raises at the first call that would make a step wait for results."""
    model, arch = build(**WIDE)
    schedule = random_schedule(arch, 3, 2)
    options = training_options(batch_size=12, precision="bf16")
    partial = ready(schedule, model, arch, options)
    partial.train(True)
    images, labels = data(arch, 12)
    meter = Meter(device=CUDA)
    stepper = Stepper(partial, CLASSIFY, options, learning_rate, meter)
    for _ in range(2):
        stepper.step(Batch(images, labels))
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step(Batch(images, labels))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scores_are_the_cpus():
    model, arch = build(**WIDE)
    found = []
    for device in (torch.device("cpu"), CUDA):
        partial = ready(all_of(arch), model, arch, training_options(), device)
        found.append(
            probe_scores(
                partial, Batch(*data(arch, 3, device)), CLASSIFY, MEASURED, Meter(device=device)
            )
        )
    for kind in MEASURED:
        assert found[0][kind] == pytest.approx(found[1][kind], rel=1e-2), kind
