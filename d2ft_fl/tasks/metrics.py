"""What a task's figures are called, and which of them decides: the part that files record."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pages and listings show metrics without PyTorch, which tasks import
    from d2ft_fl.tasks.task import Task


@dataclass(frozen=True)
class MetricSpec:
    """The metrics of a task.

    Attributes:
        task: Name of the task.
        names: Names of all metrics, in the order in which they are shown.
        primary: Name of the metric that decides which of two models is the better one.
        maximise: Whether a larger primary metric is better.
        percent: Names of the metrics that are shares between 0 and 1, shown in per cent.
    """

    task: str
    names: tuple[str, ...]
    primary: str
    maximise: bool
    percent: frozenset[str]

    @classmethod
    def of(cls, task: "Task") -> "MetricSpec":
        """Take the metrics of a task."""
        return cls(task.name, task.metrics, task.primary, task.maximise, task.percent)

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> "MetricSpec":
        """Read what :meth:`entries` of a line of ``rounds.jsonl`` or of ``summary.json`` hold."""
        task = entries["task"]
        return cls(
            task["name"],
            tuple(entries["metrics"]),
            task["primary"],
            task["maximise"],
            frozenset(task["percent"]),
        )

    def entries(self, figures: Mapping[str, float | None] | None) -> dict[str, Any]:
        """Return what a line of ``rounds.jsonl`` says of metrics, as JSON.

        ``metrics`` has each by its name, ``task`` says how to read them. Beside these, each metric
        stands under its name alone, which is short to write in scripts and trackers.

        Args:
            figures: Values of all metrics; None where the model was not evaluated.
        """
        values = {name: None if figures is None else figures[name] for name in self.names}
        task = {
            "name": self.task,
            "primary": self.primary,
            "maximise": self.maximise,
            "percent": sorted(self.percent),
        }
        return {**values, "metrics": values, "task": task}

    def best(self, values: Iterable[float | None]) -> float | None:
        """Return the best of those values of the primary metric that are known; None of none."""
        return min((v for v in values if v is not None), key=self.order, default=None)

    def order(self, value: float) -> float:
        """Return a number that is the smaller, the better a value of the primary metric is."""
        return -value if self.maximise else value
