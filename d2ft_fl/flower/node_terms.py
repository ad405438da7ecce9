"""What a SuperNode decides for itself, and what it takes from whoever starts a run.

A node of a deployment owns its data, its budget and the modules that it imports. Its
``--node-config`` says what they are, or that a run may say it:

    partition-id, num-partitions   which clients it serves
    dataset, label-column, image-column, test-split, bad-examples,
    partitioner, partitioner-args, train-examples   its data
    budgets                        its budget, which it keeps whatever a plan promises
    device, threads-per-client     how it computes; by default as the run says
    takes                          "data", "budgets" or both, which it then takes from the run
    plug-ins                       modules that a run may have it import, separated by commas

In a simulation the machine is the server's own, and everything is as the run says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2ft_fl.budgets.sources import MEASURED
from d2ft_fl.config.choices import TUNINGS
from d2ft_fl.config.run_config import OPTIONS
from d2ft_fl.config.sources import absolute
from d2ft_fl.errors import ConfigError
from d2ft_fl.util.spelling import unknown

PLACE = ("partition-id", "num-partitions")
# The options of a node's data, and what they are where the node names a data set and not them.
OWN_DATA = {
    "dataset": "",
    "label-column": "label",
    "image-column": "",
    "test-split": "",
    "bad-examples": "leave-out",
    "partitioner": "all",
    "partitioner-args": "",
    "train-examples": 0,
}
MACHINE = ("device", "threads-per-client")
TAKES, PLUG_INS = "takes", "plug-ins"
TAKEN = ("data", "budgets")
KNOWN = (*PLACE, *OWN_DATA, "budgets", *MACHINE, TAKES, PLUG_INS)
# What is the server's: a client has the defaults, so that nothing in it is looked for on a node.
SERVERS = ("strategy", "trackers", "run-folder", "resume", "pretrained", "lora-adapter")


@dataclass(frozen=True)
class NodeTerms:
    """The options under which a node's clients train.

    Attributes:
        options: By their keys in TOML.
        owns_budget: Whether the node set its own budget.
    """

    options: Mapping[str, Any]
    owns_budget: bool = False

    @classmethod
    def of(cls, run: Mapping[str, Any], node: Mapping[str, Any], simulated: bool) -> "NodeTerms":
        """Return a node's terms for a run.

        Args:
            run: The run's options, as the server sends them.
            node: The node's configuration.
            simulated: Whether the node is one of a simulation.

        Raises:
            ConfigError: When the run says what the node lets nobody say, or the node's
                configuration is wrong.
        """
        if strange := sorted(node.keys() - {*KNOWN}):
            raise ConfigError(unknown("node-config: ", strange[0], KNOWN))
        said = {key: node[key] for key in (*OWN_DATA, "budgets", *MACHINE) if key in node}
        own = absolute(said, Path())
        if simulated:
            return cls({**run, **own})
        takes = _listed(node, TAKES)
        if strange := [name for name in takes if name not in TAKEN]:
            raise ConfigError(unknown(f"node-config: {TAKES} = ", strange[0], TAKEN))
        if "dataset" in own:
            own = {**OWN_DATA, **own}
        elif "data" not in takes:
            raise ConfigError(
                "a node takes no data from a run: set dataset in its --node-config, or "
                f'{TAKES}="data" to let runs choose'
            )
        if "budgets" not in own and "budgets" not in takes:
            raise ConfigError(
                "a node takes no budget from a run: set budgets in its --node-config, such as "
                f'budgets="{MEASURED}", or {TAKES}="budgets" to let runs choose'
            )
        given = {key: value for key, value in run.items() if key not in own}
        _check_modules(given, _listed(node, PLUG_INS))
        servers = {key: OPTIONS[key].default for key in SERVERS}
        return cls({**run, **servers, **own}, "budgets" in own)


def _listed(node: Mapping[str, Any], key: str) -> list[str]:
    """Return the names that an entry of a node's configuration lists."""
    text = node.get(key, "")
    if not isinstance(text, str):
        raise ConfigError(f'node-config: {key} = {text!r} must be text, like {key}="..."')
    return [name for name in map(str.strip, text.split(",")) if name]


def _check_modules(run: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse modules that the run names and the node does not allow.

    Args:
        run: The run's options, without those that the node sets.
        allowed: Modules that the node allows.
    """
    tuning, budgets = str(run.get("tuning", "")), str(run.get("budgets", ""))
    named = [("tuning", tuning)] if tuning not in ("", *TUNINGS) else []
    if ":" in budgets and not budgets.endswith(".toml"):
        named.append(("budgets", budgets))
    for key, value in named:
        if value.partition(":")[0] not in allowed:
            raise ConfigError(
                f"{key} = {value[:60]!r} names a module, which a node imports only where its "
                f'--node-config lists it, like {PLUG_INS}="mine.module"'
            )


def place(node: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of a node, counted from 0, and how many nodes there are.

    Args:
        node: The node's configuration.

    Raises:
        ConfigError: When it does not say it, or says what cannot be.
    """
    number, nodes = (node.get(key) for key in PLACE)
    if type(number) is not int or type(nodes) is not int or not 0 <= number < nodes:
        raise ConfigError(
            f"node-config has partition-id = {number!r} and num-partitions = {nodes!r}: of N "
            "nodes, the k-th has partition-id=k, counted from 0, and num-partitions=N"
        )
    return number, nodes
