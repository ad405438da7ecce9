from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_fl.data.federated_data import open_data
from d2ft_fl.data.spec import DataSpec
from d2ft_fl.errors import ConfigError

SPEC = DataSpec(
    dataset="digits",
    label_column="label",
    image_size=16,
    channels=1,
    clients=10,
    partitioner="Dirichlet",
    partitioner_arguments=(("alpha", 0.5),),
    train_examples=0,
    test_examples=0,
    seed=0,
)
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def test_digits_are_all_there_once_and_none_of_the_test_split_trains():
    data = open_data(SPEC)
    assert len(data.train.labels) + len(data.test.labels) == 1797
    assert data.test_size == 719
    owned = np.concatenate(data.partitions)
    assert sorted(owned) == list(range(len(data.train.labels)))
    assert np.bincount(data.test.labels).min() >= 68  # stratified


def test_images_are_normalised_and_of_the_models_size():
    images, labels = open_data(SPEC).client_batch(3, np.array([0, 5]))
    assert images.shape == (2, 1, 16, 16)
    assert -1 <= images.min() < -0.9
    assert 0.5 < images.max() <= 1
    assert (
        labels.tolist()
        == open_data(SPEC).train.labels[open_data(SPEC).partitions[3][[0, 5]]].tolist()
    )


def test_images_are_decoded_once_a_process():
    data = open_data(replace(SPEC, seed=99))
    calls = []
    values = data.train.values
    data.train = replace(data.train, values=lambda rows: calls.append(len(rows)) or values(rows))
    for _ in range(3):
        data.client_batch(0, np.arange(4))
    assert calls == [len(data.partitions[0])]


def test_the_seed_decides_partitions_and_not_the_test_split():
    one, same, other = (open_data(replace(SPEC, seed=s)) for s in (1, 1, 2))
    for a, b in zip(one.partitions, same.partitions, strict=True):
        assert np.array_equal(a, b)
    assert any(
        not np.array_equal(a, b) for a, b in zip(one.partitions, other.partitions, strict=True)
    )
    assert np.array_equal(one.test.labels, other.test.labels)


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("IidPartitioner", ()),
        ("shard", (("num_shards_per_partition", 2),)),
        ("Pathological", (("num_classes_per_partition", 3),)),
        ("Linear", ()),
    ],
)
def test_any_partitioner_by_name(name, arguments):
    data = open_data(replace(SPEC, partitioner=name, partitioner_arguments=arguments))
    assert len(data.partitions) == 10
    assert len(set(np.concatenate(data.partitions))) == sum(map(len, data.partitions))


def test_a_sample_of_the_training_split():
    data = open_data(replace(SPEC, train_examples=100, partitioner="Iid", partitioner_arguments=()))
    assert sum(map(len, data.partitions)) == 100


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"clients": 2000}, "clients = 2000 is more than the 1078 training examples"),
        ({"partitioner_arguments": (("beta", 1),)}, "'beta' is not a parameter of Dirichlet"),
        ({"partitioner_arguments": (("alpha", -1.0),)}, "cannot share 1078 examples"),
        ({"partitioner_arguments": ()}, "partitioner-args lacks 'alpha', which Dirichlet"),
        ({"partitioner_arguments": (("alfa", 1),)}, r"'alfa' .* \(did you mean 'alpha'\?\)"),
        (
            {"partitioner_arguments": (("alpha", 0.5), ("min_partition_size", 200))},
            r"10 clients have fewer than min_partition_size = 200 examples in ten draws .*client 0 "
            r"has \d+, client 1 .*lower min_partition_size in partitioner-args, raise alpha = 0.5",
        ),
        (
            {
                "partitioner": "Pathological",
                "partitioner_arguments": (("num_classes_per_partition", 20),),
            },
            "`num_classes_per_partition`=20 is greater",
        ),
        (
            {
                "clients": 700,
                "partitioner": "Shard",
                "partitioner_arguments": (("num_shards_per_partition", 2),),
            },
            "some would get a part without examples",
        ),
        (
            {"clients": 300, "partitioner_arguments": (("alpha", 0.1), ("min_partition_size", 0))},
            "is left with no examples",
        ),
        ({"dataset": "/nowhere"}, "is not a folder"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_data(replace(SPEC, **changes))
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Twenty coloured squares in two class folders, split into train and test."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 255, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path


def test_a_folder_of_images(folder):
    spec = replace(
        SPEC,
        dataset=str(folder),
        channels=3,
        clients=2,
        partitioner="Iid",
        partitioner_arguments=(),
    )
    data = open_data(spec)
    assert data.train.names == ("cat", "dog")
    assert data.client_batch(0, np.array([0]))[0].shape == (1, 3, 16, 16)
    assert data.test_size == 4


def test_partitions_of_a_folder_that_lies_by_class_are_mixed(folder):
    spec = replace(SPEC, dataset=str(folder), channels=3, clients=2)
    data = open_data(replace(spec, partitioner="Iid", partitioner_arguments=()))
    for part in data.partitions:
        assert set(data.train.labels[part]) == {0, 1}


def test_train_and_test_labels_get_the_same_numbers(tmp_path):
    draw = np.random.default_rng(0)
    for split, kinds in (("train", [0, 1, 2] * 4), ("test", [1, 2, 2])):
        images = [Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in kinds]
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"img": images, "label": kinds}, features=features)
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    spec = replace(SPEC, dataset=str(tmp_path), clients=2, partitioner="Iid")
    data = open_data(replace(spec, partitioner_arguments=()))
    assert data.test.names == data.train.names == ("0", "1", "2")
    assert data.test.labels.tolist() == [1, 2, 2]


def test_a_folder_with_a_test_split_only_does_not_train_on_what_it_tests(tmp_path):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 10}, features=features)
    table.to_parquet(str(tmp_path / "test.parquet"))
    spec = replace(SPEC, dataset=str(tmp_path), clients=2, partitioner="Iid")
    data = open_data(replace(spec, partitioner_arguments=()))
    assert (len(data.train.labels), data.test_size) == (16, 4)


def test_palettes_and_transparency_become_colours(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(5):
            colour = Image.new("RGB", (8, 8), (200, 30, 90))
            image = colour.convert("P") if name == "a" else colour.convert("RGBA")
            image.save(tmp_path / "train" / name / f"{index}.png")
    spec = replace(SPEC, dataset=str(tmp_path), channels=3, clients=1, partitioner="Iid")
    data = open_data(replace(spec, partitioner_arguments=()))
    images, _ = data.client_batch(0, np.arange(8))
    wanted = np.array([200, 30, 90]) / 127.5 - 1
    assert np.abs(images.mean(dim=(0, 2, 3)).numpy() - wanted).max() < 0.05


def test_labels_that_cannot_be_used_are_refused(tmp_path):
    for name, count in (("a", 5), ("b", 1)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(ConfigError, match="has one example of class 'b'"):
        open_data(replace(SPEC, dataset=str(tmp_path), clients=1))


def test_a_folder_of_parquet_without_test_split_and_with_text_labels(tmp_path):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(20)]
    table = datasets.Dataset.from_dict(
        {"picture": images, "kind": ["odd", "even"] * 10},
        features=datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")}),
    )
    table.to_parquet(str(tmp_path / "train.parquet"))
    spec = replace(
        SPEC,
        dataset=str(tmp_path),
        label_column="kind",
        clients=2,
        partitioner="Iid",
        partitioner_arguments=(),
    )
    data = open_data(spec)
    assert data.train.names == ("even", "odd")
    assert len(data.train.labels) == 16
    assert data.test_size == 4
    with pytest.raises(ConfigError, match=r"label-column = 'label' .* picture, kind"):
        open_data(replace(spec, label_column="label"))


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ConfigError, match="holds no images and no tables"):
        open_data(replace(SPEC, dataset=str(tmp_path)))
    tmp_path.joinpath("train.csv").write_text("a,label\n1,2\n1,3\n")
    with pytest.raises(ConfigError, match=r"no images in dataset .* its columns are a, label"):
        open_data(replace(SPEC, dataset=str(tmp_path)))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-10 as parquet beside the checkout")
def test_cifar10():
    spec = replace(
        SPEC, dataset=str(CIFAR), channels=3, image_size=32, train_examples=200, test_examples=20
    )
    data = open_data(replace(spec, partitioner="Iid", partitioner_arguments=()))
    assert data.classes == 10
    assert data.client_batch(0, np.arange(3))[0].shape == (3, 3, 32, 32)
    assert data.test_size == 20


def test_made_up_images_are_the_same_everywhere_and_of_any_number():
    spec = DataSpec("made-up", "label", 8, 3, 5, "Iid", (), 0, 0, 3)
    data, again = open_data(spec), open_data.__wrapped__(spec)
    assert [len(part) for part in data.partitions] == [32] * 5
    assert data.test_size == 256
    images, labels = data.client_batch(4, np.arange(32))
    assert images.shape == (32, 3, 8, 8)
    assert torch.equal(images, again.client_batch(4, np.arange(32))[0])
    assert len(labels.unique()) > 3


def test_all_gives_everyone_everything():
    data = open_data(DataSpec("made-up", "label", 8, 1, 3, "all", (), 20, 10, 0))
    assert [len(part) for part in data.partitions] == [20, 20, 20]
    assert np.array_equal(data.partitions[0], data.partitions[2])
