"""JSON is always JSON, whatever stands in it."""

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_fl.errors import ReplyError
from d2ft_fl.util.strict_json import read_json, write_json

ROOT = Path(__file__).parents[2]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def refuse(text):
    raise AssertionError(f"{text} is no JSON")


def with_nulls(value):
    """The value with None for what JSON has no word for, one leaf at a time."""
    if isinstance(value, dict):
        return {k: with_nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_nulls(v) for v in value]
    odd = isinstance(value, float) and (value != value or abs(value) == math.inf)
    return None if odd else value


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_json_and_reads_back(value):
    text = write_json(value)
    assert json.loads(text, parse_constant=refuse) == with_nulls(value)
    assert read_json(text, len(text)) == with_nulls(value)


@pytest.mark.parametrize(
    "text",
    [
        '{"x": NaN}', '{"x": [Infinity]}', '{"x": -Infinity}', '{"x": 1e999}', '{"x": -1e999}',
        "[1]", "3", "null", "", "{", "[" * 100_000, '{"x": ' + "9" * 5000 + "}", b"\xff{}",
    ],
)  # fmt: skip
def test_what_is_no_object_of_finite_numbers_is_refused(text):
    with pytest.raises(ReplyError, match="JSON"):
        read_json(text, 1 << 20)


def test_a_text_that_is_too_long_is_not_looked_at():
    assert read_json('{"x": 1}', 8) == {"x": 1}
    with pytest.raises(ReplyError, match="JSON of 9 characters, where 8 are the most"):
        read_json('{"x": 12}', 8)


def test_nothing_writes_json_but_this():
    """Python's own ``dump`` and ``dumps`` write NaN."""
    found = set()
    for path in (ROOT / "d2ft_fl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps"):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"d2ft_fl/util/strict_json.py"}
