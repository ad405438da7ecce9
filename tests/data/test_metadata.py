"""What files beside images say of them: metadata, cards, tables with odd separators."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from d2ft_fl.data.federated_data import open_data
from d2ft_fl.errors import ConfigError
from tests.data.files import class_folders, declared, loaded, parquet, png, save, spec


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
    (tmp_path / "cat" / "5.png").rename(tmp_path / "cat" / "9.png")  # which no row names
    found = loaded(tmp_path)
    assert found.names == ["z", "a"]
    assert any("1 of 13 examples of split 'train' have no label" in note for note in found.notes)


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
