"""Folders as people have them: each is read, or refused with what to do."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from d2ft_fl.data.federated_data import open_data
from d2ft_fl.data.folders import Choice, load
from d2ft_fl.data.spec import SPLIT_SEED
from d2ft_fl.errors import ConfigError
from tests.data.files import class_folders, declared, parquet, picture, png, save, spec


def loaded(folder, label="label", **choice):
    return load.__wrapped__(Choice(str(folder), label, **choice))


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


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("labelled", [True, False])
def test_metadata_beside_class_folders(tmp_path, ending, labelled):
    class_folders(tmp_path / "train")
    names = [f"{kind}/{index}.png" for kind in ("cat", "dog") for index in range(5)]
    table = pd.DataFrame({"file_name": names, "owner": [f"o{i}" for i in range(10)]})
    if labelled:
        table["label"] = [10, 9] * 5
    path = tmp_path / "train" / f"metadata.{ending}"
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    found = loaded(tmp_path)
    assert found.names == (["9", "10"] if labelled else ["cat", "dog"])
    assert set(found.train["owner"]) | set(found.test["owner"]) == set(table["owner"])


def test_metadata_of_some_images_only(tmp_path):
    class_folders(tmp_path)
    names = [f"cat/{i}.png" for i in range(4)] + ["dog/0.png", "dog/1.png", "dog/99.png"]
    lines = [f"{name},{'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    tmp_path.joinpath("metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    found = loaded(tmp_path)
    assert any("4 of 11 examples of split 'train' have no label" in note for note in found.notes)
    data = open_data(spec(tmp_path))
    bad = [str(example) for part in data.inspected for example in part.bad]
    assert bad == ["row 10 of split 'train' (dog/99.png): there is no such file"]


def test_metadata_without_file_names_is_refused(tmp_path):
    class_folders(tmp_path)
    tmp_path.joinpath("metadata.csv").write_text("name,label\ncat/0.png,1\n")
    with pytest.raises(ConfigError, match=r"metadata.csv' has no column 'file_name'"):
        loaded(tmp_path)
    tmp_path.joinpath("metadata.csv").write_text("file_name,image\ncat/0.png,1\n")
    with pytest.raises(ConfigError, match=r"has a column 'image', .* rename it"):
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
    assert "splits that are not used: 'test', 'extra'" in loaded(
        splits, test_split="validation"
    ).notes or any("not used" in note for note in other.notes)
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


# -- metadata and cards ------------------------------------------------------------------------


def metadata(path, rows, header="file_name,label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))


def test_metadata_of_all_splits_leaves_each_its_own_images(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for index in range(count):
            save(tmp_path / split / f"{index}.png", seed=index)
    rows = [(f"train/{i}.png", i % 2) for i in range(6)] + [(f"test/{i}.png", i) for i in range(2)]
    metadata(tmp_path / "metadata.csv", rows)
    found = loaded(tmp_path)
    for half, split, count in ((found.train, "train", 6), (found.test, "test", 2)):
        folders = {Path(image["path"]).parent.name for image in half["image"]}
        assert (folders, len(half)) == ({split}, count)


def test_metadata_between_root_and_images_is_read(tmp_path):
    class_folders(tmp_path / "data", ("x", "y"), 6)
    rows = [(f"{k}/{i}.png", "ab"[i % 2]) for k in "xy" for i in range(6)]
    metadata(tmp_path / "data" / "metadata.csv", rows)
    assert loaded(tmp_path).names == ["a", "b"]


def test_metadata_tells_the_class_where_folders_do_not(tmp_path):
    rows = []
    for index in range(6):
        save(tmp_path / "cat" / f"{index}.png")
        save(tmp_path / "cat" / "old" / f"{index}.png")
        rows += [(f"cat/{index}.png", 1), (f"./cat/x/../old/{index}.png", 2)]
    metadata(tmp_path / "metadata.csv", rows)
    assert not any("no label" in note for note in loaded(tmp_path).notes)


def test_two_rows_of_one_image_are_refused(tmp_path):
    class_folders(tmp_path)
    metadata(tmp_path / "metadata.csv", [("cat/0.png", "a"), ("cat/0.png", "b")])
    with pytest.raises(ConfigError, match=r"two rows of '.*cat/0.png'"):
        loaded(tmp_path)


def test_metadata_keeps_the_names_that_it_declares(tmp_path):
    class_folders(tmp_path, count=6)
    feature = datasets.Features(
        {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(6)]
    table = datasets.Dataset.from_dict({"file_name": names, "label": [0, 1] * 6}, feature)
    table.to_parquet(str(tmp_path / "metadata.parquet"))
    assert loaded(tmp_path).names == ["a", "z"]


@pytest.mark.parametrize("separator,ending", [("\t", "tsv"), (";", "csv")])
def test_tables_of_texts_with_other_separators(tmp_path, separator, ending):
    lines = [f"image{separator}label"]
    for index in range(10):
        save(tmp_path / "pictures" / f"{index}.png", seed=index)
        lines.append(f"pictures/{index}.png{separator}{'ab'[index % 2]}")
    (tmp_path / "table").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "table" / ".pictures")
    text = "\n".join(lines).replace("pictures/", ".pictures/")
    (tmp_path / "table" / f"train.{ending}").write_text(text)
    if ending == "csv":
        card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n---\n"
        (tmp_path / "table" / "README.md").write_text(card)
    assert loaded(tmp_path / "table").names == ["a", "b"]


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': dog
          '1': cat
---
"""


@pytest.mark.parametrize("test", [["cat", "dog"], ["", None]])
def test_a_card_declares_names_of_numbers_and_of_texts(tmp_path, test):
    parquet(tmp_path / "train.parquet", ["cat", "dog"] * 5)
    parquet(tmp_path / "test.parquet", test)
    (tmp_path / "README.md").write_text(CARD)
    assert loaded(tmp_path).names == ["dog", "cat"]
    parquet(tmp_path / "numbers" / "train.parquet", [0, 1] * 5)
    (tmp_path / "numbers" / "README.md").write_text(CARD)
    assert loaded(tmp_path / "numbers").names == ["dog", "cat"]


def test_a_relative_folder_of_tables(tmp_path, monkeypatch):
    parquet(tmp_path / "here" / "train.parquet", [0, 1] * 5)
    monkeypatch.chdir(tmp_path)
    assert loaded("here").names == ["0", "1"]


def test_splits_without_rows_and_notes_beside_tables_are_passed_over(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 5)
    parquet(tmp_path / "test.parquet", [], [])
    for name in ("LICENSE.txt", "classes.txt", "notes.txt"):
        (tmp_path / name).write_text("some text")
    assert loaded(tmp_path).splits == ("train", "train")


def test_columns_that_differ_or_hold_no_images_are_refused(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 5, number=range(10))
    with pytest.raises(ConfigError, match="image-column = 'number' holds no images"):
        loaded(tmp_path, image="number")
    pd.DataFrame({"img": [png(), png()], "label": [0, 1]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"split 'test' .* has no column 'image'"):
        loaded(tmp_path)


@pytest.mark.parametrize("format", ["torch", "numpy", "arrow", "pandas"])
def test_the_format_that_a_data_set_was_saved_in_is_of_no_matter(tmp_path, format):
    data = declared([0, 1] * 5, "ab")
    data.set_format(format, columns=["label"])
    data.save_to_disk(tmp_path / "saved")
    data = open_data(spec(tmp_path / "saved"))
    assert data.client_batch(0, np.arange(1))[0].shape == (1, 3, 8, 8)


def test_dictionaries_of_relative_paths_begin_at_the_folder(tmp_path):
    for index in range(10):
        save(tmp_path / "in" / f"{index}.png", seed=index)
    images = [{"bytes": None, "path": f"in/{index}.png"} for index in range(10)]
    parquet(tmp_path / "train.parquet", [0, 1] * 5, images)
    assert len(open_data(spec(tmp_path)).train) == 8
