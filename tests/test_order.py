"""The order of tests, of which the Makefile's two processes make use."""

from types import SimpleNamespace

from tests.conftest import INTEGRATION, pytest_collection_modifyitems


def test_real_processes_come_first_and_all_else_stays_in_order():
    names = ["api/b.py", "integration/b.py", "integration/a.py", "wire/a.py"]
    items = [SimpleNamespace(path=INTEGRATION.parent / name) for name in names]
    pytest_collection_modifyitems(items)
    found = [item.path.relative_to(INTEGRATION.parent).as_posix() for item in items]
    assert found == ["integration/b.py", "integration/a.py", "api/b.py", "wire/a.py"]
