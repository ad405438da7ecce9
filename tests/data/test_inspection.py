import datasets
import numpy as np
import pytest
from PIL import Image

from d2ft_fl.data import inspection
from d2ft_fl.data.federated_data import open_data
from d2ft_fl.errors import ConfigError
from tests.data.files import class_folders, parquet, picture, png, spec


@pytest.fixture
def spoilt(tmp_path):
    """Two classes of six images, of which three are bad."""
    class_folders(tmp_path / "train", count=6)
    class_folders(tmp_path / "test", count=2)
    tmp_path.joinpath("train/cat/1.png").write_bytes(png(picture(size=64))[:3000])
    tmp_path.joinpath("train/dog/0.png").write_text("no image")
    tmp_path.joinpath("test/dog/1.png").write_bytes(bytes(100))
    return tmp_path


def test_bad_images_are_left_out_named_and_counted(spoilt):
    data = open_data(spec(spoilt))
    assert len(data.train) == 10
    assert data.test_size == 3
    assert sum(map(len, data.partitions)) == 10
    for client, part in enumerate(data.partitions):
        data.client_batch(client, np.arange(len(part)))
    data.test_batch(0, 3)
    (train, test) = [line for line in data.notes if "left out" in line]
    assert train.startswith("2 of 12 examples of split 'train' are left out: row 1 of split")
    assert "row 6 of split 'train' (train/dog/0.png): it is no image" in train
    assert "row 3 of split 'test' (test/dog/1.png): it holds nothing but null bytes" in test
    assert [example["row"] for example in data.describe()["train"]["left_out"]] == [1, 6]
    secret = data.describe(private=True)
    assert secret.keys() == {"dataset", "classes", "test"}
    assert [example["row"] for example in secret["test"]["left_out"]] == [3]


def test_bad_images_can_stop_a_run(spoilt):
    with pytest.raises(
        ConfigError, match=r"row 1 of split 'train' \(train/cat/1.png\).*bad-examples"
    ):
        open_data(spec(spoilt, bad_examples="stop"))


def test_a_data_set_of_bad_images_alone_is_refused(tmp_path):
    values = np.array([[0.0, 213.0]], dtype=np.float32)
    for kind in ("a", "b"):
        for index in range(5):
            path = tmp_path / kind / f"{index}.tiff"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(values).save(path)
    with pytest.raises(ConfigError, match=r"no image that can be used: row . of split 'train'"):
        open_data(spec(tmp_path))


def test_images_are_looked_at_once_on_a_machine_and_again_when_they_change(spoilt, monkeypatch):
    looks = []
    look = inspection._look
    monkeypatch.setattr(inspection, "_look", lambda *a: looks.append(len(a[1])) or look(*a))
    first = open_data.__wrapped__(spec(spoilt))
    again = open_data.__wrapped__(spec(spoilt))
    assert looks == [12, 4]
    assert again.notes == first.notes
    spoilt.joinpath("train/cat/1.png").write_bytes(png())
    assert len(open_data.__wrapped__(spec(spoilt)).train) == 11
    assert looks == [12, 4, 12]


def test_a_null_among_images_of_a_table(tmp_path):
    images = [png(seed=i) for i in range(6)]
    images[2] = None
    parquet(tmp_path / "train.parquet", [0, 1] * 3, images)
    parquet(tmp_path / "test.parquet", [0, 1])
    data = open_data(spec(tmp_path))
    assert len(data.train) == 5
    assert str(data.inspected[0].bad[0]) == "row 2 of split 'train': there is no image"


def test_clients_whose_images_are_of_one_colour_are_named(tmp_path):
    blank = [png(Image.new("RGB", (8, 8), (i, i, i))) for i in range(10)]
    parquet(tmp_path / "blank.parquet", [0, 1] * 5, blank)
    notes = open_data(spec(tmp_path)).notes
    assert any("all images of 2 of 2 clients (0, 1)" in note for note in notes)
    blank[::2] = [png(seed=i) for i in range(5)]
    parquet(tmp_path / "some" / "train.parquet", [0, 1] * 5, blank)
    notes = open_data(spec(tmp_path / "some", clients=1)).notes
    assert not any("colour" in note for note in notes)


def test_images_that_use_little_of_16_bits_are_noted(tmp_path):
    deep = [Image.fromarray(np.full((8, 8), 4095 - i, dtype=np.uint16)) for i in range(4)]
    parquet(tmp_path / "train.parquet", [0, 1] * 2, [png(image) for image in deep])
    parquet(tmp_path / "test.parquet", [0, 1])
    notes = open_data(spec(tmp_path)).notes
    assert any("have 16 bits and no value above 4095: they are dark" in note for note in notes)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_what_the_system_failed_to_read_is_looked_at_again(tmp_path, monkeypatch, error):
    class_folders(tmp_path)
    decode = datasets.Image.decode_example

    def fails(self, value, *rest):
        if value["path"].endswith("cat/0.png"):
            raise error
        return decode(self, value, *rest)

    monkeypatch.setattr(datasets.Image, "decode_example", fails)
    first = open_data.__wrapped__(spec(tmp_path))
    assert sum(len(part.bad) for part in first.inspected) == 1
    monkeypatch.undo()
    again = open_data.__wrapped__(spec(tmp_path))
    assert sum(len(part.bad) for part in again.inspected) == 0
