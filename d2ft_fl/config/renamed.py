"""Old names of options, which files and commands may go on using.

Every reader of options accepts an old name, and says once in a process what the option is called
now. Files that were written before a renaming, such as the ``config.toml`` of a run's folder, are
read in the same way.
"""

import logging
from collections.abc import Mapping
from typing import Any

from d2ft_fl.errors import ConfigError

RENAMED = {"accumulate": "micro-batches"}  # the present name by the old one
# Attributes of an execution policy in ``clients.jsonl``, where they differ from those of today.
RENAMED_IN_POLICIES = {"accumulate": "micro_batches"}

_FIRST = {now: old for old, now in RENAMED.items()}
_log = logging.getLogger(__name__)
_told: set[str] = set()


def notice(old: str, present: str) -> str:
    """Return the line that says what an option is called now."""
    return f"d2ft: option {old} is called {present} now"


def given_twice(old: str, present: str) -> ConfigError:
    """Return the refusal of an option that is given under both names."""
    return ConfigError(f"{old} is the old name of {present}, which is given too: leave {old} out")


def renamed(entries: Mapping[str, Any], quietly: bool = False) -> dict[str, Any]:
    """Return options under their present names, in their order.

    Args:
        entries: Options by present or old names.
        quietly: Whether to leave out the line that names the present name: where nobody who reads
            it could change the file.

    Raises:
        ConfigError: When an option is given under both names.
    """
    found: dict[str, Any] = {}
    for key, value in entries.items():
        now = RENAMED.get(key, key)
        if now != key and now in entries:
            raise given_twice(key, now)
        if now != key and not quietly and key not in _told:
            _told.add(key)
            _log.warning(notice(key, now))
        found[now] = value
    return found


def first_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under the names that they had first, which identities are computed from.

    So what was named after its options, like the trials of a sweep, is found again.
    """
    return {first_name(key): value for key, value in entries.items()}


def first_name(key: str) -> str:
    """Return the name that an option had first."""
    return _FIRST.get(key, key)


def policy_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an execution policy on record under their present names."""
    return {RENAMED_IN_POLICIES.get(name, name): value for name, value in entries.items()}
