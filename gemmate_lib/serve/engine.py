"""The engine: one thread owns the model, a bounded queue feeds it, and adapters come and go.

Requests are generated for together as long as they run, and join and leave between two tokens.
Each answer is the one that `gemmate generate` gives for its prompt alone.
"""

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmate_lib import timestamps
from gemmate_lib.config import GemmateError
from gemmate_lib.generate import encode_prompt, end_tokens
from gemmate_lib.manifest import file_sha256
from gemmate_lib.serve.answers import Answer, Ask, too_late
from gemmate_lib.serve.decoding import Batch, Row
from gemmate_lib.serve.fleet import Adapter, Fleet
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.pieces import Pieces
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


@dataclass(frozen=True)
class Load:
    """How much there is to do: requests that wait, and slots in use and in all."""

    waiting: int
    running: int
    slots: int


@dataclass(eq=False)
class _Entry:
    """A name's adapter; `users`: the requests that are to be answered by it."""

    served: Served
    adapter: Adapter
    max_tokens: int
    now: bool  # a prompt without a timestamp is asked now
    users: int = 0


@dataclass(eq=False)
class _Request(Row):
    """A row with where its text goes."""

    answer: Answer = field(kw_only=True)
    pieces: Pieces = field(kw_only=True)
    entry: _Entry = field(kw_only=True)
    max_tokens: int = field(kw_only=True)


class Engine:
    """Serve a base under its own name, and runs as adapters on it."""

    def __init__(
        self, base: "LoadedModel", *, held: "ModelConfig | None" = None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """Start the thread; `close` ends it. The base must have no adapter on it.

        held: how the base was loaded; a run that holds it otherwise is refused.
        """
        self.limits, self.tokenizer = limits or Limits(), base.tokenizer
        self._fleet = Fleet(base, held=held)
        self._ends = set(end_tokens(base.model, base.tokenizer))
        self._context = getattr(base.model.config.get_text_config(), "max_position_embeddings", 0)
        name = base.base["id"]
        name = Path(name).name if Path(name).is_dir() else name
        aware, longest = self._fleet.base.time_aware, GenerationSettings().max_new_tokens
        self._base = Served(name, aware, int(time.time()), base.base["weights_sha256"])
        self._entries = {name: _Entry(self._base, self._fleet.base, longest, now=aware)}
        self._retired: list[_Entry] = []
        self._waiting: deque[_Request] = deque()
        self._batches: dict[str, Batch] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()  # a tokenizer is not made for several threads
        self._draining = self._closed = False
        self._pace = 0.1  # seconds of a request, lately
        self._thread = threading.Thread(target=self._work, name="gemmate-engine", daemon=True)
        self._thread.start()

    def models(self) -> list[Served]:
        """What is served now, the base first."""
        with self._changed:
            return [entry.served for entry in self._entries.values()]

    def load(self) -> Load:
        """How much there is to do."""
        with self._changed:
            return Load(len(self._waiting), self._running(), self.limits.slots)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._draining

    def add(self, name: str, run: "Run") -> Served:
        """Serve a run under a name; a name that is taken is its from the next request on.

        Raises: GemmateError for the base's name, or a run that cannot be served over this base.
        """
        if name == self._base.name:
            raise GemmateError(f"{name} is the name of the base. Give the run another one.")
        created = int(datetime.fromisoformat(run.manifest["created"]).timestamp())
        digest = file_sha256(run.directory / "manifest.json")

        def put() -> Served:
            adapter = self._fleet.add(run)
            served = Served(name, adapter.time_aware, created, digest)
            longest = run.experiment.generation.max_new_tokens
            now = adapter.time_aware and run.experiment.dataset.timestamp is not None
            with self._changed:
                if old := self._entries.get(name):
                    self._retired.append(old)
                self._entries[name] = _Entry(served, adapter, longest, now)
            return served

        return self._ask_thread(put)

    def remove(self, name: str) -> None:
        """Take a run away; what it has begun it finishes.

        Raises: GemmateError where none has that name.
        """
        with self._changed:
            if name not in self._entries or name == self._base.name:
                raise GemmateError(f"No run is served as {name}. See the models.")
            self._retired.append(self._entries.pop(name))
            self._changed.notify_all()

    def submit(self, ask: Ask) -> Answer:
        """Take a question into the queue.

        Raises: Refused with the status that says why: an unknown model, too long a prompt, a
            full queue, a server that stops.
        """
        with self._changed:
            entry = self._entries.get(ask.model)
        if entry is None:
            raise Refused(f"There is no model {ask.model!r}. See /v1/models.", status=404,
                          code="model_not_found", param="model")  # fmt: skip
        with self._encoding:
            ids = encode_prompt(self.tokenizer, ask.prompt)
        longest, asked_at = self._room(ask, entry, len(ids)), self._moment(ask, entry)
        answer = Answer(ask, prompt_tokens=len(ids), seconds=self.limits.seconds)
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        request = _Request(
            ids, ask.temperature, ask.top_p, seed, asked_at, entry.adapter, answer=answer,
            pieces=Pieces(self.tokenizer, ask.stop), entry=entry, max_tokens=longest,
        )  # fmt: skip
        with self._changed:
            self._refuse_now()
            entry.users += 1
            self._waiting.append(request)
            self._changed.notify_all()
        return answer

    def _refuse_now(self) -> None:
        if self._draining or not self._thread.is_alive():
            raise Refused("The server is stopping. Ask another one.", status=503, retry_after=5,
                          code="stopping")  # fmt: skip
        if len(self._waiting) >= self.limits.queue:
            wait = self._pace * (len(self._waiting) + self._running()) / self.limits.slots
            raise Refused(f"{len(self._waiting)} requests wait already. Try again later.",
                          status=429, retry_after=max(1, math.ceil(wait)),
                          code="queue_full")  # fmt: skip

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
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return not self._waiting and not self._running()

    def close(self, timeout: float | None = None) -> None:
        """Answer what is there, then end the thread; after `timeout` seconds without waiting."""
        self.drain()
        self._thread.join(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _running(self) -> int:
        return sum(len(batch.rows) for batch in self._batches.values())

    # What follows runs in the thread.

    def _ask_thread(self, job: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        with self._changed:
            if not self._thread.is_alive():
                raise GemmateError("The engine is closed. Start another one.")
            self._jobs.append((job, done))
            self._changed.notify_all()
        return done.result()

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._wait():
                self._do_jobs()
                self._admit()
                for lane in [*self._batches]:
                    self._step(lane)
                self._retire()
        finally:
            self._give_up()

    def _wait(self) -> bool:
        """Wait for work; whether there will be any more."""
        with self._changed:
            self._changed.wait_for(self._something)
            return not self._closed and (self._busy() or not self._draining)

    def _busy(self) -> bool:
        return bool(self._jobs or self._waiting or self._batches)

    def _something(self) -> bool:
        unused = any(entry.users == 0 for entry in self._retired)
        return self._busy() or self._draining or self._closed or unused

    def _do_jobs(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                done.set_result(job())
            except Exception as error:
                done.set_exception(error)

    def _admit(self) -> None:
        """Read the prompts of those that wait, as far as there are slots."""
        lanes: dict[str, list[_Request]] = {}
        with self._changed:
            free = self.limits.slots - self._running()
            taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for request in taken:
            if not self._ended(request):
                lanes.setdefault(request.adapter.lane, []).append(request)
        for lane, requests in lanes.items():
            self._guarded(requests, partial(self._begin, lane, requests))

    def _begin(self, lane: str, requests: list[_Request]) -> None:
        pad, device = self.tokenizer.pad_token_id, self._fleet.model.device
        batch = Batch(requests, self._forward, pad_id=pad, device=device)
        self._tell(batch)
        if not batch.rows:
            return
        with self._changed:
            if lane in self._batches:
                self._batches[lane].join(batch)
            else:
                self._batches[lane] = batch

    def _step(self, lane: str) -> None:
        batch = self._batches[lane]

        def forward() -> None:
            batch.step()
            self._tell(batch)

        if not self._guarded(batch.rows, forward) or not batch.rows:
            with self._changed:
                del self._batches[lane]

    def _guarded(self, requests: list[Any], work: Callable[[], None]) -> bool:
        """Whether it went well; what fails ends its own requests and nothing else."""
        mine = [*requests]
        try:
            work()
        except Exception as error:
            message = f"The model failed: {type(error).__name__}. Ask again, or see the log."
            self._failed(error)
            for request in mine:
                self._end(request, error=Refused(message, status=500, code="model_failed"))
            return False
        return True

    def _failed(self, error: Exception) -> None:
        import logging

        logging.getLogger(__name__).error("a batch failed: %s", error, exc_info=error)

    def _forward(self, rows: Any, inputs: dict[str, Any]) -> Any:
        if rows[0].time is not None:
            inputs["timestamps"] = torch.tensor([row.time for row in rows]).to(
                inputs["input_ids"].device
            )
        return self._fleet.forward([row.adapter for row in rows], inputs)

    def _tell(self, batch: Batch) -> None:
        """Hand the new tokens on; let those go that are at their end."""
        going = [
            i
            for i, (request, token) in enumerate(zip(batch.rows, batch.tokens, strict=True))
            if not self._ended(request) and not self._said(request, token)
        ]
        if not going:
            batch.rows = []
        elif len(going) < len(batch.rows):
            batch.keep(going)

    def _said(self, request: Any, token: int) -> bool:
        """Whether the answer ends with this token."""
        answer, pieces = request.answer, request.pieces
        if answer.first is None:
            answer.first = time.monotonic() - answer.began
        if token in self._ends:
            answer.say(pieces.end())
            self._end(request, "stop")
            return True
        answer.completion_tokens += 1
        answer.say(pieces.add(token))
        full = answer.completion_tokens >= request.max_tokens
        if full and not pieces.stopped:
            answer.say(pieces.end())
        if pieces.stopped or full:
            self._end(request, "stop" if pieces.stopped else "length")
            return True
        return False

    def _ended(self, request: Any) -> bool:
        """Whether nobody wants the answer any more, or it takes too long."""
        if request.answer.cancelled:
            self._end(request)
        elif request.answer.out_of_time():
            self._end(request, error=too_late(self.limits.seconds))
        return bool(request.answer.done)

    def _end(self, request: Any, finish: Any = None, error: Exception | None = None) -> None:
        if request.answer.done:
            return
        with self._changed:
            request.entry.users -= 1
        if finish:
            self._pace += 0.1 * (time.monotonic() - request.answer.began - self._pace)
        request.answer.close(finish, error)

    def _retire(self) -> None:
        with self._changed:
            unused = [entry for entry in self._retired if entry.users == 0]
            self._retired = [entry for entry in self._retired if entry.users]
        for entry in unused:
            self._fleet.drop(entry.adapter)

    def _give_up(self) -> None:
        """End what is still there when it must end at once."""
        with self._changed:
            rows = [*self._waiting, *(row for b in self._batches.values() for row in b.rows)]
            self._waiting.clear()
            self._batches.clear()
        stopped = Refused("The server has stopped. Ask another one.", status=503, retry_after=5)
        for request in rows:
            self._end(request, error=stopped)
        self._do_jobs()
