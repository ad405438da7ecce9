"""Where a run's figures go besides its folder: TensorBoard, Weights & Biases, MLflow, or your own.

A tracker is started with the run's configuration and folder, hears of each finished round, and of
the end. Trackers only listen: one that raises is switched off, and the run goes on without it.
"""

import copy
import importlib
import importlib.util
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from d2ft_fl.errors import ConfigError, RunError
from d2ft_fl.util.plugins import load_attribute
from d2ft_fl.util.spelling import unknown

_EXTRAS = ("wandb", "mlflow")  # of this project; each imports the package of its name
BUILTIN = ("tensorboard", *_EXTRAS)
_COUNTED = ("faults", "violations")  # lists, of which the number is the figure
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """A started tracker of one run."""

    def round(self, row: dict[str, Any]) -> None:
        """Hear that a round has ended; see :func:`scalars`.

        Args:
            row: The round's line of ``rounds.jsonl``.
        """

    def finish(self, summary: dict[str, Any]) -> None:
        """Hear that the run has ended well.

        Args:
            summary: What ``summary.json`` holds.
        """

    def fail(self, reason: str) -> None:
        """Hear that the run has failed, or that this tracker has raised; nothing follows."""


# Starts a tracker, given the configuration by its keys in TOML and the run folder.
Factory = Callable[[Mapping[str, Any], Path], Sink]


def load_trackers(text: str) -> dict[str, Factory]:
    """Factories of the trackers that ``text`` lists, by name: "tensorboard, mine.sinks:Printer".

    Raises:
        ConfigError: For an unknown name, a package that is not installed, or a plug-in that cannot
            be imported or called.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    return {name: _plugin(name) if ":" in name else _builtin(name) for name in names}


def _plugin(name: str) -> Factory:
    factory = load_attribute(name, "trackers")
    if not callable(factory):
        raise ConfigError(f"trackers = {name!r} is not callable; name a factory(config, folder)")
    return factory


def _builtin(name: str) -> Factory:
    if name not in BUILTIN:
        raise ConfigError(
            f"{unknown('trackers = ', name, BUILTIN)}, or module:callable of a factory of your own"
        )
    if name in _EXTRAS and not _is_installed(name):
        raise ConfigError(
            f"trackers = {name!r} needs a package that is not installed; install the extra "
            f"{name!r}: pip install -e '.[{name}]'"
        )

    def start(config: Mapping[str, Any], folder: Path) -> Sink:
        return importlib.import_module(f"{__name__}.{name}").start(config, folder)

    return start


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder without code, such as the wandb/ that W&B leaves where it ran, would import too.
    return spec is not None and spec.origin is not None


def scalars(entries: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return every figure of a round's row or of a summary, by a name that is the same in all runs.

    A metric of the task has its name alone. Figures of a resource are called like
    ``flops/used_mean``, and ``flops/share`` is the mean client's use as a share of training
    everything. Of faults and violations the figure is their number. Values of None are left out, as
    is a row's ``round``, which is the step.

    Args:
        entries: A line of ``rounds.jsonl``, or what ``summary.json`` holds.
        prefix: What all names begin with.
    """
    figures: dict[str, float] = {}
    for key, value in entries.items():
        if isinstance(value, Mapping):
            figures |= scalars(value, prefix if key == "metrics" else f"{prefix}{key}/")
        elif key in _COUNTED and isinstance(value, list):
            figures[prefix + key] = float(len(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
            figures[prefix + key] = float(value)
    used, full = figures.get(f"{prefix}used_mean"), figures.get(f"{prefix}full_mean")
    if used is not None and full:
        figures[f"{prefix}share"] = used / full
    return figures


@dataclass
class Trackers:
    """The trackers of one run, as one.

    Attributes:
        sinks: Those that still listen, by name.
        switched_off: One line for each that raised.
    """

    sinks: dict[str, Sink] = field(default_factory=dict)
    switched_off: list[str] = field(default_factory=list)

    def round(self, row: dict[str, Any]) -> None:
        """Tell all of a finished round."""
        self._tell("round", row, f"in round {row['round']}")

    def finish(self, summary: dict[str, Any]) -> None:
        """Tell all that the run has ended well."""
        self._tell("finish", summary, "at the end")
        self.sinks.clear()

    def fail(self, reason: str) -> None:
        """Tell those that still listen that the run has failed."""
        self._tell("fail", reason, "at the end")
        self.sinks.clear()

    def _tell(self, event: str, what: Any, when: str) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                getattr(sink, event)(copy.deepcopy(what))  # the run needs what it tells
            # W&B calls sys.exit where its service ended badly; the run need not end for that.
            except (Exception, SystemExit) as error:
                del self.sinks[name]
                message = f"tracker {name} raised {_one_line(error)} {when} and was switched off"
                self.switched_off.append(message)
                _log.warning(message)
                if event != "fail":
                    _give_up(sink, message)


def _give_up(sink: Sink, reason: str) -> None:
    """Let a sink that has raised end what it started, if it can."""
    try:
        sink.fail(reason)
    except (Exception, SystemExit):
        _log.debug("a tracker could not be closed", exc_info=True)


def _one_line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def tracking(
    factories: Mapping[str, Factory], config: Mapping[str, Any], folder: Path
) -> Iterator[Trackers]:
    """Start trackers; whatever ends the block otherwise than :meth:`Trackers.finish` fails them.

    Raises:
        RunError: When one cannot be started.
    """
    trackers = Trackers()
    try:
        for name, start in factories.items():
            try:
                trackers.sinks[name] = start(config, folder)
            except (Exception, SystemExit) as error:
                raise RunError(
                    f"tracker {name} cannot be started ({_one_line(error)}); mend that, or leave "
                    "it out of trackers"
                ) from error
        yield trackers
    except BaseException as error:
        trackers.fail(_one_line(error))
        raise
