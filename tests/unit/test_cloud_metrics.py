"""Cloud Monitoring: its real client, telling a server on this machine what a run logs."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from gemmate_lib import cloud_metrics
from gemmate_lib.cloud_metrics import CloudMetrics, check_cloud, time_series
from gemmate_lib.config import GemmateError, TrackingConfig

pytest.importorskip("google.cloud.monitoring_v3")
METHOD = "/google.monitoring.v3.MetricService/CreateTimeSeries"
STATE = SimpleNamespace(global_step=3, is_world_process_zero=True)


class Server:
    """Answers CreateTimeSeries on a port of this machine, and keeps what it was told."""

    def __init__(self) -> None:
        import grpc
        from google.cloud.monitoring_v3 import CreateTimeSeriesRequest
        from google.protobuf.empty_pb2 import Empty

        self.told: list[Any] = []
        self.refuse = False

        def answer(request: Any, context: Any) -> Any:
            self.told.append(request)
            if self.refuse:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")
            return Empty()

        handler = grpc.unary_unary_rpc_method_handler(
            answer, CreateTimeSeriesRequest.deserialize, Empty.SerializeToString
        )
        service, name = METHOD.lstrip("/").split("/")
        self.server = grpc.server(ThreadPoolExecutor(1))
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service, {name: handler})]
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def client(self) -> Any:
        import grpc
        from google.cloud.monitoring_v3 import MetricServiceClient
        from google.cloud.monitoring_v3.services.metric_service.transports import (
            MetricServiceGrpcTransport,
        )

        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        return MetricServiceClient(transport=MetricServiceGrpcTransport(channel=channel))


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.server.stop(None).wait()


def tell(metrics: CloudMetrics, *losses: float, end: bool = True) -> None:
    metrics.on_train_begin(None, STATE, None)
    for loss in losses:
        metrics.on_log(None, STATE, None, logs={"loss": loss, "epoch": 1.0, "num_tokens": 9.0})
    if end:
        metrics.on_train_end(None, STATE, None)


def test_the_real_client_tells_the_real_messages(server: Server) -> None:
    before = time.time()
    look: Callable[[], dict[str, float]] = lambda: {"cpu_percent": 99.0}  # noqa: E731
    tell(CloudMetrics("my-project", "quotes", look=look, client=server.client), 2.5, 2.4)
    (request,) = server.told  # two points within ten seconds would be refused
    assert request.name == "projects/my-project"
    series = {each.metric.type.removeprefix("custom.googleapis.com/gemmate/"): each
              for each in request.time_series}  # fmt: skip
    values = {name: each.points[0].value.double_value for name, each in series.items()}
    assert values == {"loss": 2.5, "step": 3.0, "cpu_percent": 99.0}
    loss = series["loss"]
    assert dict(loss.metric.labels) == {"run": "quotes"} and len(loss.points) == 1
    assert (loss.resource.type, dict(loss.resource.labels)) == (
        "global", {"project_id": "my-project"},
    )  # fmt: skip
    assert before - 1 <= loss.points[0].interval.end_time.timestamp() <= time.time() + 1


def test_every_ten_seconds_what_is_new(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cloud_metrics.time, "monotonic", lambda: now[0])
    metrics = CloudMetrics("p", "r", client=server.client)
    metrics.on_train_begin(None, STATE, None)
    for loss in range(25):
        metrics.on_log(None, STATE, None, logs={"loss": float(loss)})
        metrics._sending.result()  # type: ignore[union-attr]
        now[0] += 1
    metrics.on_train_end(None, STATE, None)
    told = [r.time_series[0].points[0].value.double_value for r in server.told]
    assert told == [0.0, 10.0, 20.0]


def test_one_that_fails_is_named_once_and_told_nothing_more(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cloud_metrics, "EVERY", 0.0)
    server.refuse = True
    metrics = CloudMetrics("p", "r", client=server.client)
    with caplog.at_level(logging.WARNING, logger="gemmate"):
        tell(metrics, 2.0, end=False)
        assert isinstance(metrics._sending.exception(), Exception)  # type: ignore[union-attr]
        for _ in range(3):
            metrics.on_log(None, STATE, None, logs={"loss": 1.0})
        metrics.on_train_end(None, STATE, None)
    assert len(server.told) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "Cloud Monitoring failed and is told nothing more: 403 not you"
    ]


def test_without_credentials_it_fails_as_quietly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody() -> Any:
        raise RuntimeError("no credentials")

    with caplog.at_level(logging.WARNING, logger="gemmate"):
        tell(CloudMetrics("p", "r", client=nobody), 2.0)
    assert "told nothing more: no credentials" in caplog.text


def test_only_the_first_of_several_processes_tells(server: Server) -> None:
    metrics = CloudMetrics("p", "r", client=server.client)
    second = SimpleNamespace(global_step=1, is_world_process_zero=False)
    metrics.on_train_begin(None, second, None)
    metrics.on_log(None, second, None, logs={"loss": 1.0})
    metrics.on_train_end(None, second, None)
    assert server.told == []


def test_what_is_not_finite_is_left_out() -> None:
    values = {"a": math.nan, "b": math.inf, "c": 1.0} | {f"n{n}": 1.0 for n in range(300)}
    request = time_series(values, project="p", run="r", moment=12.5)
    assert len(request.time_series) == cloud_metrics.MOST
    assert request.time_series[0].metric.type.endswith("/c")
    assert request.time_series[0].points[0].interval.end_time.timestamp() == 12.5


def test_a_missing_client_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cloud(TrackingConfig())
    check_cloud(TrackingConfig(cloud_monitoring="p"))
    monkeypatch.setitem(sys.modules, "google.cloud.monitoring_v3", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_cloud(TrackingConfig())
    with pytest.raises(GemmateError, match=r"gemmate-course\[cloud\]"):
        check_cloud(TrackingConfig(cloud_monitoring="p"))
