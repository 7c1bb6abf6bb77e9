"""What a server counts, in Prometheus' form; a model's name is a label only if it is served."""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemmate_lib.serve.answers import Answer
    from gemmate_lib.serve.engine import Engine
    from gemmate_lib.serve.follow import TagFollower

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OTHER = "-"


class Meters:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: "Engine") -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry, self._engine = CollectorRegistry(), engine
        own = self.registry
        self._requests = Counter(
            "gemmate_requests", "Answered requests.", ("route", "status", "model"), registry=own
        )
        self._tokens = Counter("gemmate_tokens", "Tokens.", ("direction", "model"), registry=own)
        self._seconds = Histogram(
            "gemmate_request_seconds", "From the request to its last byte.", ("route",),
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self._first = Histogram(
            "gemmate_first_token_seconds", "From the queue to the first token.", buckets=SECONDS,
            registry=own,
        )  # fmt: skip
        self._gauges()

    def _gauges(self) -> None:
        import psutil
        import torch
        from prometheus_client import Gauge

        load, process = self._engine.load, psutil.Process()
        found = {
            "gemmate_queue_length": ("Requests that wait.", lambda: load().waiting),
            "gemmate_slots_used": ("Requests that are generated for.", lambda: load().running),
            "gemmate_slots": ("Slots in all.", lambda: load().slots),
            "gemmate_models": ("Models served.", lambda: len(self._engine.models())),
            "gemmate_memory_bytes": ("Resident memory.", lambda: process.memory_info().rss),
        }
        if torch.cuda.is_available():
            found["gemmate_gpu_memory_bytes"] = (
                "Memory of the GPU.",
                torch.cuda.memory_allocated,
            )
        for name, (said, value) in found.items():
            Gauge(name, said, registry=self.registry).set_function(value)

    def follow(self, follower: "TagFollower") -> None:
        """Tell of each tag that is followed whether the version that it names is the one served."""
        from prometheus_client import Gauge

        gauge = Gauge(
            "gemmate_tag_behind", "1 where a tag's version could not be served.", ("tag",),
            registry=self.registry,
        )  # fmt: skip
        for tag in follower.runs:
            gauge.labels(tag).set_function(partial(follower.is_behind, tag))

    def request(self, route: str, status: int, model: str | None, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status), self._known(model)).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, answer: "Answer") -> None:
        """Count the tokens of an answer that has ended."""
        model = self._known(answer.ask.model)
        self._tokens.labels("in", model).inc(answer.prompt_tokens)
        self._tokens.labels("out", model).inc(answer.completion_tokens)
        if answer.first is not None:
            self._first.observe(answer.first)

    def _known(self, model: str | None) -> str | None:
        names = {served.name for served in self._engine.models()}
        return model if model in names else OTHER

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
