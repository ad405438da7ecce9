"""The page on architecture names files and tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "d2ft_fl/models/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:d2ft_fl|tests|strategies|clients|experiments|docs)/[\w./-]*)", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    file = ""
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / page).read_text()):
        file = path or file
        if test:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
