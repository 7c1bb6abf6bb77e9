"""The engine: names and what they stand for, and questions to them; models come and go.

Each answer is the one that `gemmate generate` gives for its prompt alone, whatever it is batched
with: exactly, where it is greedy and computed in float32.
"""

import math
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gemmate_lib import timestamps
from gemmate_lib.config import GemmateError
from gemmate_lib.generate import encode_prompt, end_tokens
from gemmate_lib.manifest import file_sha256
from gemmate_lib.serve.answers import Answer, Ask
from gemmate_lib.serve.fleet import Fleet
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.pieces import Pieces
from gemmate_lib.serve.worker import Holder, Load, Request, Worker
from gemmate_lib.settings import GenerationSettings

if TYPE_CHECKING:
    from gemmate_lib.config import ModelConfig
    from gemmate_lib.models import LoadedModel
    from gemmate_lib.sft import Run

__all__ = ["Answer", "Ask", "Engine", "Load", "Served"]


@dataclass(frozen=True)
class Served:
    """A model that is served; created: seconds since the epoch; digest: of the run's manifest."""

    name: str
    time_aware: bool
    created: int
    digest: str | None


@dataclass(eq=False)
class _Entry(Holder):
    """What a name stands for; now: a prompt without a timestamp is asked now."""

    served: Served = field(kw_only=True)
    max_tokens: int = field(kw_only=True)
    now: bool = field(kw_only=True)


class Engine:
    """Serve a base under its own name, and runs as adapters on it."""

    def __init__(
        self, base: "LoadedModel", *, held: "ModelConfig | None" = None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """Start serving; `close` ends it. The base must have no adapter on it.

        held: how the base was loaded; a run that holds it otherwise is refused.
        """
        self.limits, self.tokenizer = limits or Limits(), base.tokenizer
        self._context = getattr(base.model.config.get_text_config(), "max_position_embeddings", 0)
        name = base.base["id"]
        name = Path(name).name if Path(name).is_dir() else name
        self._fleet = Fleet(base, held=held)
        adapter, longest = self._fleet.base, GenerationSettings().max_new_tokens
        aware = adapter.time_aware
        self._base = Served(name, aware, int(time.time()), base.base["weights_sha256"])
        entry = _Entry(adapter, served=self._base, max_tokens=longest, now=aware)
        self._entries = {name: entry}
        self._encoding = threading.Lock()  # a tokenizer is not made for several threads
        ends = set(end_tokens(base.model, base.tokenizer))
        pad = base.tokenizer.pad_token_id
        self._worker = Worker(self._fleet, limits=self.limits, ends=ends, pad_id=pad)

    def models(self) -> list[Served]:
        """What is served now, the base first."""
        with self._worker.lock:
            return [entry.served for entry in self._entries.values()]

    def load(self) -> Load:
        """How much there is to do."""
        return self._worker.load()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._worker.ready

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        load = self.load()
        return not (load.waiting or load.running)

    def add(self, name: str, run: "Run") -> Served:
        """Serve a run under a name; a name that is taken stands for it from the next request on.

        Raises: GemmateError for the base's name, or a run that cannot be served over this base.
        """
        if name == self._base.name:
            raise GemmateError(f"{name} is the name of the base. Give the run another one.")
        created = int(datetime.fromisoformat(run.manifest["created"]).timestamp())
        digest = file_sha256(run.directory / "manifest.json")
        adapter = self._worker.do(lambda: self._fleet.add(run))
        served = Served(name, adapter.time_aware, created, digest)
        entry = _Entry(
            adapter, served=served, max_tokens=run.experiment.generation.max_new_tokens,
            now=adapter.time_aware and run.experiment.dataset.timestamp is not None,
        )  # fmt: skip
        with self._worker.lock:
            old = self._entries.get(name)
            self._entries[name] = entry
        if old:
            self._worker.retire(old)
        return served

    def remove(self, name: str) -> None:
        """Take a run away; what it has begun it finishes.

        Raises: GemmateError where none has that name.
        """
        with self._worker.lock:
            if name not in self._entries or name == self._base.name:
                raise GemmateError(f"No run is served as {name}. See the models.")
            entry = self._entries.pop(name)
        self._worker.retire(entry)

    def submit(self, ask: Ask) -> Answer:
        """Take a question into the queue.

        Raises: Refused with the status that says why: an unknown model, too long a prompt, a
            full queue, a server that stops.
        """
        with self._worker.lock:
            entry = self._entries.get(ask.model)
            if entry is None:
                raise Refused(f"There is no model {ask.model!r}. See /v1/models.", status=404,
                              code="model_not_found", param="model")  # fmt: skip
            self._refuse_now()  # before it costs anything
            entry.users += 1  # from here on nobody takes its adapter off
        try:
            request = self._request(ask, entry)
            with self._worker.lock:
                self._refuse_now()
                self._worker.put(request)
        except BaseException:
            self._worker.release(entry)
            raise
        return request.answer

    def _request(self, ask: Ask, entry: _Entry) -> Request:
        with self._encoding:
            ids = encode_prompt(self.tokenizer, ask.prompt)
        return Request(
            ids, ask.temperature, ask.top_p,
            secrets.randbits(63) if ask.seed is None else ask.seed,
            self._moment(ask, entry), entry.adapter,
            answer=Answer(ask, prompt_tokens=len(ids), seconds=self.limits.seconds),
            pieces=Pieces(self.tokenizer, ask.stop), holder=entry,
            max_tokens=self._room(ask, entry, len(ids)),
        )  # fmt: skip

    def _refuse_now(self) -> None:
        if not self._worker.ready:
            raise Refused("The server is stopping. Ask another one.", status=503, retry_after=5,
                          code="stopping")  # fmt: skip
        load = self.load()
        if load.waiting >= self.limits.queue:
            wait = self._worker.pace * (load.waiting + load.running) / load.slots
            raise Refused(f"{load.waiting} requests wait already. Try again later.", status=429,
                          retry_after=max(1, math.ceil(wait)), code="queue_full")  # fmt: skip

    def _room(self, ask: Ask, entry: _Entry, length: int) -> int:
        """How many tokens may follow the prompt."""
        most, limits = ask.max_tokens, self.limits
        if length > limits.prompt_tokens:
            raise Refused(f"The prompt has {length} tokens, of {limits.prompt_tokens} at most. "
                          "Shorten it.", code="prompt_too_long", param="prompt")  # fmt: skip
        if most is not None and most > limits.output_tokens:
            raise Refused(f"max_tokens is {most}, of {limits.output_tokens} at most. Ask for "
                          "fewer.", code="too_many_tokens", param="max_tokens")  # fmt: skip
        wanted = min(entry.max_tokens, limits.output_tokens) if most is None else most
        if self._context and length + (1 if most is None else wanted) > self._context:
            raise Refused(f"The prompt has {length} tokens and the model reads {self._context} in "
                          "all. Shorten it, or ask for fewer.", param="prompt",
                          code="context_length_exceeded")  # fmt: skip
        return min(wanted, self._context - length) if self._context else wanted

    def _moment(self, ask: Ask, entry: _Entry) -> int | None:
        """When a time-aware model is asked; None for another one."""
        if entry.served.time_aware:
            if ask.timestamp is not None:
                return ask.timestamp
            return timestamps.now() if entry.now else timestamps.MISSING
        if ask.timestamp is not None:
            raise Refused(f"{ask.model} knows no time: it has no temporal encoder. Leave the "
                          "timestamp out.", code="no_time", param="timestamp")  # fmt: skip
        return None

    def drain(self) -> None:
        """Take no more requests; those that are there are answered."""
        self._worker.drain()

    def close(self, timeout: float | None = None) -> None:
        """Answer what is there, for `timeout` seconds at most, and end."""
        self._worker.close(timeout)
