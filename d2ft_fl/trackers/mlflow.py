"""MLflow: a run in files in the run folder's ``mlruns/``, or where ``MLFLOW_TRACKING_URI`` says.

Its metrics' steps are rounds. Nothing of MLflow's global state (the active run) is touched.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2ft_fl.trackers import scalars

# Read when mlflow is imported. It asks to be told that files are wanted, not a database.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

MOST_PARAMS = 100  # of one request


class MLflow:
    """A run of the experiment ``d2ft-fl``, or of the one that ``MLFLOW_EXPERIMENT_NAME`` names."""

    def __init__(self, config: Mapping[str, Any], folder: Path):
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "d2ft-fl")
        self._client, self._step = MlflowClient(tracking_uri=uri), 0
        experiment = self._experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + MOST_PARAMS])

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made where there is none."""
        if experiment := self._client.get_experiment_by_name(name):
            return str(experiment.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run has made it meanwhile
            if experiment := self._client.get_experiment_by_name(name):
                return str(experiment.experiment_id)
            raise

    def round(self, row: dict[str, Any]) -> None:
        """Log one step of every metric."""
        self._step = int(row["round"])
        self._log(scalars(row))

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the totals, as metrics at the last round."""
        self._log(scalars(summary, "summary/"))
        self._client.set_terminated(self._run, "FINISHED")

    def fail(self, reason: str) -> None:
        """Set the reason as a tag."""
        self._client.set_tag(self._run, "failure", reason)
        self._client.set_terminated(self._run, "FAILED")

    def _log(self, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, self._step) for key, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)


start = MLflow
