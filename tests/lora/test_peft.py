"""Everything assigned, a client's epoch is peft's own training of the same model and batches."""

import copy

import pytest
import torch
import torch.nn.functional as F

from d2ft_fl.clients.lora import LoraTuning
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.engine.meter import Meter
from d2ft_fl.engine.numerics import Numerics
from d2ft_fl.engine.partial_model import PartialModel
from d2ft_fl.engine.trainer import train
from d2ft_fl.lora.config import Lora, with_lora
from d2ft_fl.lora.init import begin
from d2ft_fl.lora.peft_files import target_pattern
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.packing import pack_for
from d2ft_fl.tasks.task import Batch
from tests.conftest import CLASSIFY, all_of, build, images_for, training_options, weights_of

learning_rate = LoraTuning(RunConfig()).learning_rate


def batches(images, labels, size):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


@pytest.mark.parametrize(
    "dtype,optimizer,tolerance",
    [
        (torch.float64, "sgd", 1e-10),
        (torch.float64, "adamw", 1e-6),  # Adam divides by tiny second moments
        (torch.float32, "sgd", 1e-5),
        (torch.float32, "adamw", 1e-5),
    ],
)
@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, alpha=8.0),
        Lora(rank=4, alpha=8.0, rslora=True),
        Lora(rank=2, targets=("qkv", "fc2")),
    ],
    ids=["all", "rslora", "some"],
)
def test_an_epoch_is_pefts(lora, dtype, optimizer, tolerance):
    from peft import LoraConfig, get_peft_model

    model, base = build(embed_dim=48, depth=2)
    model.to(dtype)
    arch = with_lora(base, lora)
    state = begin(arch, weights_of(model), "lora", 0)
    images, labels = images_for(arch, 20, dtype)
    options = training_options(batch_size=8, optimizer=optimizer, lora_lr=0.01, head_lr=0.02)

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=target_pattern(arch, lora.targets_in(arch)),
        modules_to_save=["head"],
    )
    theirs = get_peft_model(copy.deepcopy(model), config)
    named = {_ours(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == {p.name for p in arch.parameters if p.trains}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state[name])
    groups = [
        {
            "params": [p for name, p in named.items() if (arch.by_name[name].kind) is kind],
            "lr": learning_rate(kind, kind is not Kind.FINAL, options),
        }
        for kind in (Kind.SLICED, Kind.SHARED, Kind.FINAL)
    ]
    step = (
        torch.optim.AdamW(groups, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for x, y in batches(images, labels, 8):
        step.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        step.step()

    schedule = all_of(arch)
    partial = PartialModel(TimmViT(model), arch, Numerics(dtype))
    partial.reset(schedule, pack_for(arch, state, schedule))
    data = (Batch(*rows) for rows in batches(images, labels, 8))
    train(partial, data, CLASSIFY, options, learning_rate, Meter())
    for name, tensor in partial.update().items():
        p, expected = arch.by_name[name], named[name].detach()
        if p.kind is Kind.SLICED:
            expected = p.pack(expected, range(arch.heads))
        assert (tensor - expected).norm() <= tolerance * expected.norm(), name


def _ours(name):
    """peft's name of a parameter as the architecture has it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".default", "").replace("modules_to_save.", "")
