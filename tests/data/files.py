"""Small data sets on disk: images and tables of them."""

import io

import datasets
import numpy as np
import pandas as pd
from PIL import Image

from d2ft_fl.data.folders import Choice, load
from d2ft_fl.data.spec import DataSpec


def picture(seed=0, mode="RGB", size=8):
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(image=None, seed=0):
    """The bytes of an image as PNG."""
    file = io.BytesIO()
    (image or picture(seed)).save(file, "png")
    return file.getvalue()


def save(path, image=None, seed=0):
    """Write an image, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(seed)).save(path)


def class_folders(folder, classes=("cat", "dog"), count=5):
    """Write ``count`` images a class, each class in a folder of its name."""
    for name in classes:
        for index in range(count):
            save(folder / name / f"{index}.png", seed=index)
    return folder


def parquet(path, labels, images=None, column="label", **more):
    """Write a table of images as pandas does: bytes, and a column of labels unless None."""
    images = images or [png(seed=index) for index in range(len(labels))]
    columns = {"image": images, **({column: labels} if labels is not None else {}), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path)


def declared(labels, names):
    """A data set of images whose labels are numbers of declared names."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    images = [picture(index) for index in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def spec(folder, **changes):
    """What opens a folder for two clients who share it evenly."""
    options = {
        "dataset": str(folder),
        "label_column": "label",
        "image_size": 8,
        "channels": 3,
        "clients": 2,
        "partitioner": "Iid",
        "partitioner_arguments": (),
        "train_examples": 0,
        "test_examples": 0,
        "seed": 0,
    }
    return DataSpec(**{**options, **changes})


def loaded(folder, label="label", **choice):
    """What is used of a folder, read anew."""
    return load.__wrapped__(Choice(str(folder), label, **choice))
