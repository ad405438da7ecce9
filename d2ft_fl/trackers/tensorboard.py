"""TensorBoard: an event file in the run folder's ``tensorboard/``.

Look at all runs with ``tensorboard --logdir`` and the folder that holds them.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams, text

from d2ft_fl.trackers import scalars


class TensorBoard:
    """Writes events as they come.

    ``SummaryWriter`` has a thread for that: nobody hears of its errors, and once it has died events
    pile up until the next one waits forever.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path):
        self._step = 0
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        self._events = EventsWriter(str(events / "events"))
        self._config = dict(config)
        self._end: Summary | None = None

    def round(self, row: dict[str, Any]) -> None:
        """Add one point to every curve."""
        self._begin(row.get("metrics", ()))
        self._step = int(row["round"])
        self._write(_points(scalars(row)))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the totals, as points at the last round."""
        end = self._begin(summary.get("metrics", ()))
        self._write(_points(scalars(summary, "summary/")), end)
        self._events.close()

    def fail(self, reason: str) -> None:
        """Write the reason, as a text."""
        self._begin(())
        self._write(text("failure", reason))
        self._events.close()

    def _begin(self, metrics: Iterable[str]) -> Summary:
        """Write once what the tab that compares runs by their options needs; returns its end.

        Args:
            metrics: Names of the task's metrics, which only the run knows.
        """
        if self._end is None:
            experiment, begin, self._end = hparams(self._config, dict.fromkeys(metrics, 0))
            self._write(experiment, begin)
        return self._end

    def _write(self, *summaries: Summary) -> None:
        for summary in summaries:
            self._events.write_event(Event(wall_time=time.time(), step=self._step, summary=summary))
        self._events.flush()


def _points(figures: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in figures.items()])


start = TensorBoard
