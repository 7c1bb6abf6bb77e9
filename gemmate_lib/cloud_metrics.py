"""Google Cloud Monitoring: a run's curves as custom metrics, `custom.googleapis.com/gemmate/loss`.

A series is named by metric and run, and takes a point in five seconds at most (it was ten): we
send every ten. A thread of its own sends, so that no step waits for the network.
Source: https://cloud.google.com/monitoring/custom-metrics/creating-metrics
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gemmate_lib.callbacks import KEPT
from gemmate_lib.config import Experiment, TrackingConfig
from gemmate_lib.extras import need
from gemmate_lib.monitor import Monitor

if TYPE_CHECKING:
    from google.cloud.monitoring_v3 import CreateTimeSeriesRequest

log = logging.getLogger("gemmate")
EVERY = 10.0  # seconds between two points of a series
PATIENCE = 5.0  # seconds for one request
MOST = 200  # series in one request
TYPE = "custom.googleapis.com/gemmate"


class CloudMetrics(TrainerCallback):
    """Tells Cloud Monitoring of a run; once it fails it is told nothing more.

    look: what is used at the moment, besides what the trainer logs.
    client: makes the MetricServiceClient; by default with the credentials of this machine.
    """

    def __init__(
        self,
        project: str,
        run: str,
        *,
        look: Callable[[], Mapping[str, float]] = dict,
        client: Callable[[], Any] | None = None,
    ) -> None:
        self.project, self.run, self._look = project, run, look
        self._make = client or _default_client
        self._client: Any = None
        self._values: dict[str, float] = {}  # since the last sending
        self._sent = -math.inf
        self._thread: ThreadPoolExecutor | None = None
        self._sending: Future[None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin; of several processes the first alone tells."""
        if state.is_world_process_zero:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cloud-monitoring")

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Collect one record, and send what there is where ten seconds have passed."""
        logs = given.get("logs") or {}
        self._values |= {key: logs[key] for key in KEPT if key in logs}
        self._values |= {"step": float(state.global_step), **self._look()}
        if time.monotonic() - self._sent >= EVERY:
            self._send()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Send what is left, where a series takes it already, and wait for it."""
        if time.monotonic() - self._sent >= EVERY:
            self._send()
        thread, self._thread = self._thread, None
        if thread:
            thread.shutdown(wait=True)
            self._failed()

    def _send(self) -> None:
        if self._thread is None or (self._sending and not self._sending.done()) or self._failed():
            return
        values, self._values, self._sent = self._values, {}, time.monotonic()
        request = time_series(values, project=self.project, run=self.run, moment=time.time())
        self._sending = self._thread.submit(self._request, request)

    def _request(self, request: "CreateTimeSeriesRequest") -> None:
        if self._client is None:
            self._client = self._make()
        self._client.create_time_series(request=request, timeout=PATIENCE)

    def _failed(self) -> bool:
        """Whether the last sending failed; said once, and then nothing more is sent."""
        error = self._sending.exception() if self._sending else None
        if error is None:
            return False
        log.warning("Cloud Monitoring failed and is told nothing more: %s", error)
        if self._thread:
            self._thread.shutdown(wait=False)
        self._thread = self._sending = None
        return True


def _default_client() -> Any:
    from google.cloud.monitoring_v3 import MetricServiceClient

    return MetricServiceClient()


def time_series(
    values: Mapping[str, float], *, project: str, run: str, moment: float
) -> "CreateTimeSeriesRequest":
    """The request that writes one point of each value; what is not finite is left out.

    moment: Unix time. The points hang on the resource `global`, with `run` as their label.
    """
    from google.cloud import monitoring_v3 as api

    interval = api.TimeInterval(end_time={"seconds": int(moment), "nanos": int(moment % 1 * 1e9)})
    series = [
        api.TimeSeries(
            metric={"type": f"{TYPE}/{name}", "labels": {"run": run}},
            resource={"type": "global", "labels": {"project_id": project}},
            points=[api.Point(interval=interval, value={"double_value": float(value)})],
        )
        for name, value in values.items()
        if math.isfinite(value)
    ]
    return api.CreateTimeSeriesRequest(name=f"projects/{project}", time_series=series[:MOST])


def check_cloud(settings: TrackingConfig) -> None:
    """Raise GemmateError where Cloud Monitoring is asked for and its client is not installed."""
    if settings.cloud_monitoring is None:
        return
    need(
        "google.cloud.monitoring_v3", "Cloud Monitoring", extra="cloud",
        otherwise=", or leave tracking.cloud_monitoring out",
    )  # fmt: skip


def cloud_metrics(experiment: Experiment, monitor: Monitor | None) -> CloudMetrics | None:
    """What to add to a trainer's callbacks; None where it is not asked for."""
    settings = experiment.tracking
    if settings.cloud_monitoring is None:
        return None
    look = (lambda: monitor.latest) if monitor else dict
    return CloudMetrics(settings.cloud_monitoring, settings.run_name or experiment.name, look=look)
