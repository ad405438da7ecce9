"""Folders as people have them: each is read, or refused with what to do."""

import datasets
import numpy as np
import pytest

from d2ft_fl.data.federated_data import open_data
from d2ft_fl.data.spec import SPLIT_SEED
from d2ft_fl.errors import ConfigError
from tests.data.files import class_folders, declared, loaded, parquet, picture, png, save, spec


def kinds(half):
    """The names of an opened split's labels, sorted."""
    return sorted(half.names[label] for label in half.labels)


# -- folders of images -------------------------------------------------------------------------


def test_class_folders_are_read_as_imagefolder_reads_them(tmp_path):
    class_folders(tmp_path / "train", ("b", "a"))
    class_folders(tmp_path / "test", ("a", "c"), 2)
    ours = loaded(tmp_path)
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert ours.names == theirs["train"].features["label"].names == ["a", "b", "c"]
    for half, split in ((ours.train, theirs["train"]), (ours.test, theirs["test"])):
        assert half["label"][:] == split["label"][:]
        undecoded = split.cast_column("image", datasets.Image(decode=False))
        assert half["image"][:] == undecoded["image"][:]


@pytest.mark.parametrize("name", ["[1]", "a*", "what?", "{x}", "with space", "ünïcode"])
@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_any_name_of_a_folder(tmp_path, name, kind):
    folder = tmp_path / name
    if kind == "images":
        class_folders(folder / "train")
        save(folder / "train" / "cat" / "[0].png")
    elif kind == "parquet":
        parquet(folder / "train [0].parquet", [0, 1] * 5)
    else:
        declared([0, 1] * 5, "ab").save_to_disk(folder)
    assert len(loaded(folder).names) == 2


@pytest.mark.parametrize("single", [True, False])
def test_what_save_to_disk_wrote(tmp_path, single):
    data = declared([0, 1] * 5, ("q", "a"))
    both = datasets.DatasetDict({"train": data, "validation": data.select(range(4))})
    (data if single else both).save_to_disk(tmp_path / "saved")
    found = loaded(tmp_path / "saved")
    assert found.names == ["q", "a"]
    assert (len(found.train), len(found.test)) == ((8, 2) if single else (10, 4))


@pytest.mark.parametrize("wrap", ["bytes", "dictionary", "path", "file beside"])
def test_parquet_of_pandas(tmp_path, wrap):
    images = [png(seed=index) for index in range(10)]
    for index in range(10):
        save(tmp_path / "pictures" / f"{index}.png", seed=index)
    written = {
        "bytes": images,
        "dictionary": [{"bytes": data, "path": None} for data in images],
        "path": [f"pictures/{index}.png" for index in range(10)],
        "file beside": [
            {"bytes": None, "path": str(tmp_path / f"pictures/{index}.png")} for index in range(10)
        ],
    }[wrap]
    parquet(tmp_path / "train.parquet", [3, 12] * 5, written)
    data = open_data(spec(tmp_path))
    assert data.train.names == ("3", "12")
    pixels, _ = data.client_batch(0, np.arange(1))
    row = data.train.row_of(int(data.partitions[0][0]))
    wanted = np.asarray(picture(row)).transpose(2, 0, 1)
    assert np.abs((pixels[0].numpy() + 1) * 127.5 - wanted).max() < 1e-3


def test_splits_may_have_other_columns_and_other_names(tmp_path):
    declared([0, 1] * 3, ("cat", "dog")).to_parquet(str(tmp_path / "train.parquet"))
    other = declared([0, 0, 1], ("dog", "cat")).add_column("more", [1, 2, 3])
    other.to_parquet(str(tmp_path / "test.parquet"))
    data = open_data(spec(tmp_path))
    assert kinds(data.train) == ["cat"] * 3 + ["dog"] * 3
    assert kinds(data.test) == ["cat", "dog", "dog"]


def test_files_of_a_split_that_declare_other_names_are_refused(tmp_path):
    declared([0, 1], ("cat", "dog")).to_parquet(str(tmp_path / "train-0.parquet"))
    declared([0, 1], ("dog", "cat")).to_parquet(str(tmp_path / "train-1.parquet"))
    with pytest.raises(ConfigError, match="'train' declare different names of classes"):
        loaded(tmp_path)


def test_nested_folders(tmp_path):
    class_folders(tmp_path / "one" / "animals", ("cat", "dog"))
    class_folders(tmp_path / "one" / "things", ("car",))
    assert loaded(tmp_path / "one").names == ["car", "cat", "dog"]
    class_folders(tmp_path / "two" / "photos-main" / "train")
    class_folders(tmp_path / "two" / "photos-main" / "test", count=1)
    found = loaded(tmp_path / "two")  # an archive that was unpacked into a folder of its own
    assert found.splits == ("train", "test")
    assert len(found.test) == 2


@pytest.mark.parametrize(
    "files,message",
    [
        (["a.png", "b.png"], "lie in no folder of their class: put"),
        (["a/0.png", "a/1.png"], "has the one class 'a'"),
        (["a/x/0.png", "b/x/0.png"], "images in 'a/x' and in 'b/x', so that it is not clear"),
        (["a/0.png", "a/x/0.png"], "images in 'a' and in 'a/x', so that it is not clear"),
        (["0.png", "a/0.png"], r"images in '.' and in 'a', so that it is not clear"),
        (["a/0.png", "b/0.png", "test/0.png"], "beside its split 'test', like 'a/0.png'"),
        (["car/0.png", "train/0.png"], "if 'train' is a class, put all classes into 'train'"),
        (["val/a/0.png", "dev/a/0.png"], "'dev', 'val', of which two are one split"),
        ([], "holds no images and no tables"),
        ([".hidden/a.png"], "holds no images and no tables"),
    ],
)
def test_folders_that_do_not_say_what_is_what_are_refused(tmp_path, files, message):
    for name in files:
        save(tmp_path / name)
    with pytest.raises(ConfigError, match=message) as error:
        loaded(tmp_path)
    assert "\n" not in str(error.value)


def test_columns_that_we_would_add_may_be_there(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 5, index=range(10), row=range(10))
    data = open_data(spec(tmp_path))
    assert sum(map(len, data.partitions)) == 8


def test_which_column_has_the_images(tmp_path):
    thumbs = [png(picture(index, size=4)) for index in range(10)]
    parquet(tmp_path / "train.parquet", [0, 1] * 5, thumbnail=thumbs)
    assert any("images are those of column 'image'" in note for note in loaded(tmp_path).notes)
    assert loaded(tmp_path, image="thumbnail").image == "thumbnail"
    with pytest.raises(ConfigError, match="image-column = 'pic' is not in dataset"):
        loaded(tmp_path, image="pic")


# -- splits ------------------------------------------------------------------------------------


@pytest.fixture
def splits(tmp_path):
    """Train, validation and test, of 10, 4 and 2 examples, and one more."""
    for name, count in (("train", 10), ("validation", 4), ("test", 2), ("extra", 6)):
        parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", [0, 1] * (count // 2))
    return tmp_path


def test_which_split_is_held_out_can_be_said(splits):
    assert loaded(splits).splits == ("train", "test")
    other = loaded(splits, test_split="validation")
    assert (other.splits, len(other.test)) == (("train", "validation"), 4)
    (unused,) = [note for note in other.notes if note.startswith("splits that are not used: ")]
    assert set(unused.partition(": ")[2].split(", ")) == {"'test'", "'extra'"}
    with pytest.raises(ConfigError, match=r"test-split = 'tset' is not in .* train, validation"):
        loaded(splits, test_split="tset")


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_a_test_split_without_labels_falls_back_to_validation(splits, labels):
    parquet(splits / "data" / "test-00000-of-00001.parquet", labels, [png(), png()])
    found = loaded(splits)
    assert found.splits == ("train", "validation")
    assert "split 'test' has no labels: 'validation' is held out instead" in found.notes
    with pytest.raises(ConfigError, match="test-split = 'test' has no labels"):
        loaded(splits, test_split="test")


def test_without_any_labelled_split_to_hold_out_a_fifth_is(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 10)
    parquet(tmp_path / "test.parquet", None, [png()])
    found = loaded(tmp_path)
    assert (len(found.train), len(found.test)) == (16, 4)
    assert "split 'test' has no labels: a fifth of 'train' is held out instead" in found.notes
    with pytest.raises(ConfigError, match="test-split = 'train' is the only split"):
        loaded(tmp_path, test_split="train")


def test_examples_without_a_label_are_left_out_and_counted(tmp_path):
    parquet(tmp_path / "train.parquet", [0, -1, 1, -1, 0, 1, 1])
    parquet(tmp_path / "test.parquet", [1, -1, 0])
    data = open_data(spec(tmp_path))
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1]
    assert [data.train.row_of(index) for index in range(5)] == [0, 2, 4, 5, 6]
    described = data.describe()
    assert (described["train"]["unlabelled"], described["test"]["unlabelled"]) == (2, 1)
    assert described["classes"] == ["0", "1"]
    assert described["test"]["examples_of_class"] == [1, 1]


def test_a_class_that_nobody_can_learn_is_named(tmp_path):
    parquet(tmp_path / "train.parquet", ["a", "b", "a"])
    parquet(tmp_path / "test.parquet", ["c", "a"])
    found = loaded(tmp_path)
    assert found.names == ["a", "b", "c"]
    assert "no example to train on has the class 'c'" in found.notes


def test_the_fifth_that_is_held_out_is_that_of_datasets(tmp_path):
    labels = [0] * 7 + [1] * 12 + [2] * 4
    parquet(tmp_path / "train.parquet", labels, number=range(23))
    found = loaded(tmp_path)
    whole = datasets.Dataset.from_dict({"label": labels, "number": list(range(23))})
    theirs = whole.cast_column("label", datasets.ClassLabel(names=["0", "1", "2"]))
    theirs = theirs.train_test_split(test_size=0.2, seed=SPLIT_SEED, stratify_by_column="label")
    assert list(found.train["number"]) == list(theirs["train"]["number"])
    assert list(found.test["number"]) == list(theirs["test"]["number"])
