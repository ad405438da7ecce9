import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_fl.data.labels import LabelColumn, class_names
from d2ft_fl.errors import ConfigError


def split(values, feature=None):
    """A split with a column of labels, as pandas would write it."""
    if feature is not None:
        features = datasets.Features({"label": feature})
        return datasets.Dataset.from_dict({"label": values}, features=features)
    return datasets.Dataset.from_pandas(pd.DataFrame({"label": values}))


def numbered(given=(), **splits):
    """Names of classes, and the numbers of each split's examples."""
    columns = {name: LabelColumn.read(data, "label", "labels") for name, data in splits.items()}
    names = class_names(columns, given, "labels")
    place = {name: index for index, name in enumerate(names)}
    return names, {name: column.numbered(place).tolist() for name, column in columns.items()}


def test_whole_numbers_are_in_numeric_order_in_all_splits():
    values = list(range(12))
    names, numbers = numbered(train=split(values[::-1]), test=split([2, 10, 11]))
    assert names == [str(value) for value in values]
    assert numbers == {"train": values[::-1], "test": [2, 10, 11]}


@given(
    st.lists(st.integers(0, 300), min_size=2, unique=True).flatmap(
        lambda classes: st.tuples(
            st.just(sorted(classes)),
            st.lists(st.sampled_from(classes), max_size=20),
            st.sampled_from(["int", "float", "text"]),
        )
    )
)
def test_an_example_is_of_the_class_that_its_value_names(case):
    classes, drawn, kind = case
    write = {"int": int, "float": float, "text": str}[kind]
    splits = {"train": split([write(c) for c in classes])}
    if drawn:
        splits["test"] = split([write(c) for c in drawn])
    names, numbers = numbered(**splits)
    order = sorted(map(str, classes)) if kind == "text" else [str(c) for c in classes]
    assert names == order
    assert [names[n] for n in numbers.get("test", [])] == [str(c) for c in drawn]


@pytest.mark.parametrize(
    "values,names",
    [
        ([1, 2, 3], ["1", "2", "3"]),
        ([5, 40, 7], ["5", "7", "40"]),
        ([True, False, True], ["False", "True"]),
        ([2.0, 10.0, 1.0], ["1", "2", "10"]),
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (pd.Categorical(["low", "high", "low"]), ["high", "low"]),
        (np.array([3, 200, 3], dtype=np.uint8), ["3", "200"]),
    ],
)
def test_names_of_each_kind_of_value(values, names):
    assert numbered(train=split(values))[0] == names


@pytest.mark.parametrize(
    "values,numbers",
    [
        ([0, -1, 1, -1], [0, -1, 1, -1]),
        ([0, None, 1], [0, -1, 1]),
        ([4.0, float("nan"), 5.0], [0, -1, 1]),
        (["a", None, "b", ""], [0, -1, 1, -1]),
    ],
)
def test_examples_without_a_label(values, numbers):
    assert numbered(train=split(values))[1]["train"] == numbers


def test_a_declared_order_is_kept_and_minus_one_has_no_label():
    feature = datasets.ClassLabel(names=["zebra", "ant"])
    names, numbers = numbered(train=split([0, 1, -1, None], feature))
    assert names == ["zebra", "ant"]
    assert numbers["train"] == [0, 1, -1, -1]


def test_splits_that_declare_the_same_names_in_another_order():
    names, numbers = numbered(
        train=split([0, 1], datasets.ClassLabel(names=["cat", "dog"])),
        test=split([0, 0, 1], datasets.ClassLabel(names=["dog", "cat"])),
    )
    assert names == ["cat", "dog"]
    assert numbers["test"] == [1, 1, 0]


def test_a_class_of_one_split_only_is_a_class():
    assert numbered(train=split(["a", "b"]), test=split(["aa"]))[0] == ["a", "aa", "b"]
    names, _ = numbered(
        train=split([0, 1], datasets.ClassLabel(names=["b", "a"])), test=split(["c", "a"])
    )
    assert names == ["b", "a", "c"]


def test_a_split_without_the_column_has_no_labels():
    other = datasets.Dataset.from_dict({"x": [1, 2]})
    assert numbered(train=split([0, 1]), test=other)[1]["test"] == [-1, -1]


def test_listed_classes_decide_the_numbers():
    names, numbers = numbered(("dog", "bird", "cat"), train=split(["cat", "dog"]))
    assert names == ["dog", "bird", "cat"]
    assert numbers["train"] == [2, 0]


@pytest.mark.parametrize(
    "splits,given,message",
    [
        ({"train": [-1, -1]}, (), "labels no example"),
        ({"train": [None, None]}, (), "labels no example"),
        ({"train": [7, 7]}, (), "the one class '7'"),
        ({"train": [-1, 1]}, (), r"the one class '1'.*-1, an empty text and a missing"),
        ({"train": [-2, 1]}, (), "holds -2: -1 means"),
        ({"train": [0.5, 1.0]}, (), "holds 0.5: classes are whole numbers or texts"),
        ({"train": [float("inf"), 1.0]}, (), "holds inf"),
        ({"train": [[1], [2]]}, (), "type list"),
        ({"train": [pd.Timestamp(2026, 1, 1), pd.Timestamp(2026, 1, 2)]}, (), "type timestamp"),
        ({"train": [0, 1], "test": ["a", "b"]}, (), "a number in one split and a text"),
        ({"train": [1, 2], "test": ["01", "02"]}, (), "a number in one split and a text"),
        ({"train": ["a", "b"]}, ("a", "c"), "has the class 'b' in split 'train', which is not one"),
    ],
)
def test_what_cannot_be_numbered_is_refused_in_a_line(splits, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        numbered(given, **{name: split(values) for name, values in splits.items()})
    assert "\n" not in str(error.value)


def test_numbers_do_not_say_which_declared_name_they_are():
    feature = datasets.ClassLabel(names=["cat", "dog"])
    with pytest.raises(ConfigError, match="numbers in split 'test' and names in another"):
        numbered(train=split([0, 1], feature), test=split([1, 1]))
    digits = datasets.ClassLabel(names=["1", "0"])  # here they do
    assert numbered(train=split([0, 1], digits), test=split([1, 0]))[1]["test"] == [0, 1]


def test_a_number_outside_of_the_declared_names_is_refused():
    feature = datasets.ClassLabel(names=["a", "b"])
    data = split([0, 1, 2], datasets.Value("int64"))
    data.info.features = datasets.Features({"label": feature})  # as a damaged file may say
    with pytest.raises(ConfigError, match="holds 2, and declares 2 classes"):
        numbered(train=data)
