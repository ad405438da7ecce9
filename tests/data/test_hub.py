"""Weights and data sets of the hub, over a stand-in of its transport."""

import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import safetensors.torch
import timm

from tests.hub_stand_in import hub

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def parquet(count, seed):
    """Images of three classes as a parquet file."""
    draw = np.random.default_rng(seed)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    pictures = [draw.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(count)]
    table = datasets.Dataset.from_dict(
        {"img": pictures, "label": [i % 3 for i in range(count)]}, features=features
    )
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def run(code, endpoint, home, **more):
    """Run code in a process whose hub is ``endpoint``; the hub's address is read at import."""
    env = {
        **os.environ,
        **more,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


WEIGHTS = f"""
import json
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import ModelSpec
spec = ModelSpec({MODEL!r}, (("depth", 2),), "hub", 64, 7, 0)
model = build_adapter(spec).model
state = model.state_dict()
print(json.dumps({{n: [float(p.double().sum()), list(p.shape)] for n, p in state.items()}}))
"""

DATA = """
import json
import numpy
from d2ft_fl.rounds.components import Components
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.data.federated_data import open_data
name = "hub:someone/pictures"
config = RunConfig(dataset=name, clients=3, partitioner="Iid", partitioner_args="")
data = open_data(Components(config).data_spec((1, 16, 16)))
images, labels = data.client_batch(0, numpy.arange(2))
sizes = [len(p) for p in data.partitions]
print(json.dumps([data.test_size, data.classes, sizes, list(images.shape)]))
"""

ABSENT = """
from d2ft_fl.errors import ConfigError
from d2ft_fl.models.build import build_adapter
from d2ft_fl.models.spec import ModelSpec
from d2ft_fl.config.run_config import RunConfig
from d2ft_fl.rounds.components import Components
for call in (
    lambda: build_adapter(ModelSpec("vit_tiny_patch16_224", (), "hub", 0, 10, 0)).model,
    lambda: Components(RunConfig(dataset="hub:no/where")).class_names,
):
    try:
        call()
    except ConfigError as error:
        print(error)
"""


def test_weights_of_the_hub_are_fitted_to_size_and_classes(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", depth=2)  # 224 pixels, 1,000 classes
    weights = safetensors.torch.save({n: t.contiguous() for n, t in source.state_dict().items()})
    with hub(models={f"timm/{MODEL}": {"model.safetensors": weights}}) as (endpoint, asked):
        done = run(WEIGHTS, endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    sums = json.loads(done.stdout.splitlines()[-1])
    assert any(f"/timm/{MODEL}/resolve/main/model.safetensors" in path for path in asked)
    for name, parameter in source.named_parameters():
        if name.startswith("blocks."):
            assert sums[name] == [float(parameter.detach().double().sum()), list(parameter.shape)]
    assert sums["head.weight"][1] == [7, 192]
    assert sums["pos_embed"][1] == [1, 17, 192]


def test_a_data_set_of_the_hub(tmp_path):
    files = {
        "data/train-00000-of-00001.parquet": parquet(30, 0),
        "data/test-00000-of-00001.parquet": parquet(9, 1),
    }
    with hub(datasets={"someone/pictures": files}) as (endpoint, asked):
        done = run(DATA, endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [9, 3, [10, 10, 10], [2, 1, 16, 16]]
    assert any(path.startswith("GET /datasets/someone/pictures/resolve/") for path in asked)


def test_the_hub_is_reached_through_a_proxy_though_own_addresses_are_not(tmp_path):
    """The stand-in is the proxy: no such host has an address."""
    source = timm.create_model("vit_tiny_patch16_224", depth=2)
    weights = safetensors.torch.save({n: t.contiguous() for n, t in source.state_dict().items()})
    spare = "from d2ft_fl.util import proxies; proxies.spare_own_addresses()\n"
    with hub(models={f"timm/{MODEL}": {"model.safetensors": weights}}) as (proxy, asked):
        done = run(spare + WEIGHTS, "http://hub.invalid", tmp_path, http_proxy=proxy)
    assert done.returncode == 0, done.stderr
    assert any(f"/timm/{MODEL}/resolve/main/model.safetensors" in path for path in asked)


def test_what_the_hub_does_not_have_is_one_line(tmp_path):
    with hub() as (endpoint, _):
        done = run(ABSENT, endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "weights of model 'vit_tiny_patch16_224' cannot be had" in first
    assert "dataset = 'hub:no/where' cannot be had from the hub" in second
