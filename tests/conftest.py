"""What tests share: small models, their architecture, and quick configurations."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from d2ft_fl.clients.full import FullTuning
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.config.training_options import TrainingOptions
from d2ft_fl.costs.cost_model import CostModel
from d2ft_fl.models.timm_check import check
from d2ft_fl.models.timm_vit import TimmViT
from d2ft_fl.runtime.in_process import InProcessPool
from d2ft_fl.subnets.architecture import Kind
from d2ft_fl.subnets.schedule import Operation, Schedule, slot_sizes
from d2ft_fl.tasks.image_classification import ImageClassification

CLASSIFY = ImageClassification()
SMALL = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
}


TARGETS = ("qkv", "proj", "fc1", "fc2")  # of LoRA in a vision transformer
learning_rate = FullTuning(RunConfig()).learning_rate
INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items):
    """Run the tests of real processes first: they wait while other workers compute."""
    items.sort(key=lambda item: not item.path.is_relative_to(INTEGRATION))


@pytest.fixture(autouse=True)
def _own_store(monkeypatch, tmp_path_factory):
    """Clients keep weights where no user's are."""
    monkeypatch.setenv("D2FT_WEIGHTS", str(tmp_path_factory.getbasetemp() / "weights"))


@pytest.fixture(autouse=True)
def _own_speeds(monkeypatch, tmp_path_factory):
    """What somebody measured on this machine changes no test, and no test what they measured."""
    monkeypatch.setenv("D2FT_SPEEDS", str(tmp_path_factory.getbasetemp() / "speeds"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(**changes):
    """A small plain ViT whose embedding is frozen, as in every run, and its architecture."""
    gated = changes.pop("gated", False)
    model = timm.create_model(**{**SMALL, **changes})
    if gated:  # timm has gated attention, but no name or argument of a model for it
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(model.embed_dim, model.embed_dim)
    model = check(model, "small")
    arch = TimmViT(model).describe()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(arch.by_name[name].kind is not Kind.EMBEDDING)
    return model, arch


def embedded(model, images):
    """The tokens [examples, tokens, dim] that enter the first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def all_of(arch, operation=Operation.FULL, slots=1):
    return Schedule.filled(operation, slots, arch.blocks, arch.heads)


def running(schedule, examples):
    """Sizes of slots for so many examples; the slots without work get none."""
    sizes = slot_sizes(examples, schedule.slots)
    return [size if on else 0 for size, on in zip(sizes, schedule.active, strict=True)]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def images_for(arch, count, dtype=torch.float32, side=16, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, side, side, generator=generator, dtype=dtype)
    return images, torch.arange(count) % arch.classes


def random_schedule(arch, slots, seed):
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet([0.8] * len(Operation))
    operations = draw.choice(len(Operation), size=(slots, arch.blocks, arch.heads), p=shares)
    if not operations.any():
        operations[0, 0, 0] = Operation.FULL
    return Schedule(operations.astype(np.int8))


def training_options(**changes):
    """How clients train where all but a few options are the defaults."""
    return TrainingOptions.of(RunConfig(**changes))


def cost_model(arch, slots=1, **options):
    return CostModel(arch, training_options(**options), slots)


@pytest.fixture
def quick(tmp_path):
    """A configuration that runs in seconds, in a folder of its own."""

    def make(**changes):
        base = {
            "rounds": 2,
            "clients": 4,
            "train_examples": 120,
            "test_examples": 60,
            "partitioner": "Iid",
            "partitioner_args": "",
            "run_folder": str(tmp_path / "run"),
        }
        return RunConfig(**{**base, **changes})

    return make


def reports_of(config, round_number=1):
    """What all clients of a configuration say before a round."""
    pool = InProcessPool(config)
    return pool.reports(round_number, list(pool.clients(round_number)))[0]
