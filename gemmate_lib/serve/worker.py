"""The thread that owns the model: a bounded queue feeds it, and nothing else touches the model.

Requests are generated for together as long as they run; they join and leave between two tokens,
and adapters are put on and taken off there as well.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gemmate_lib.config import GemmateError
from gemmate_lib.serve.answers import Answer, Finish, too_late
from gemmate_lib.serve.decoding import Batch, Row
from gemmate_lib.serve.fleet import Adapter, Fleet
from gemmate_lib.serve.limits import Limits, Refused
from gemmate_lib.serve.pieces import Pieces

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Holder:
    """An adapter while somebody needs it; `users`: the requests that are to be answered by it."""

    adapter: Adapter
    users: int = 0


@dataclass(eq=False)
class Request(Row):
    """A row with where its text goes."""

    answer: Answer = field(kw_only=True)
    pieces: Pieces = field(kw_only=True)
    holder: Holder = field(kw_only=True)
    max_tokens: int = field(kw_only=True)


@dataclass(frozen=True)
class Load:
    """How much there is to do: requests that wait, and slots in use and in all."""

    waiting: int
    running: int
    slots: int


class Worker:
    """One thread over one fleet; all that is shared with other threads is behind `lock`."""

    def __init__(self, fleet: Fleet, *, limits: Limits, ends: set[int], pad_id: int) -> None:
        """Start the thread; ends: the tokens that end an answer."""
        self._fleet, self._limits, self._ends, self._pad = fleet, limits, ends, pad_id
        self.lock = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._running: set[Request] = set()
        self._batches: dict[str, Batch] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._retired: list[Holder] = []
        self._draining = self._closed = False
        self.pace = 0.1  # seconds of a request, lately
        self._thread = threading.Thread(target=self._work, name="gemmate-engine", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._draining

    def load(self) -> Load:
        """How much there is to do."""
        with self.lock:
            return Load(len(self._waiting), len(self._running), self._limits.slots)

    def put(self, request: Request) -> None:
        """Take a request into the queue, whatever its length."""
        with self.lock:
            self._waiting.append(request)
            self.lock.notify_all()

    def do(self, job: Callable[[], Any]) -> Any:
        """Have something done between two tokens, and wait for what it returns or raises."""
        done: Future[Any] = Future()
        with self.lock:
            if self._closed:
                raise _closed()
            self._jobs.append((job, done))
            self.lock.notify_all()
        return done.result()

    def retire(self, holder: Holder) -> None:
        """Take an adapter off as soon as nobody needs it."""
        with self.lock:
            self._retired.append(holder)
            self.lock.notify_all()

    def release(self, holder: Holder) -> None:
        """Say that one user less needs an adapter."""
        with self.lock:
            holder.users -= 1
            self.lock.notify_all()

    def drain(self) -> None:
        """Take no more requests; those that are there are answered."""
        with self.lock:
            self._draining = True
            self.lock.notify_all()

    def close(self, timeout: float | None) -> None:
        """Answer what is there, for `timeout` seconds at most, then end the thread."""
        self.drain()
        self._thread.join(timeout)
        with self.lock:
            self._closed = True
            self.lock.notify_all()
        self._thread.join()

    # What follows runs in the thread.

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._wait():
                self._do_jobs()
                self._admit()
                for lane in [*self._batches]:
                    self._step(lane)
                self._take_off()
        finally:
            self._give_up()

    def _wait(self) -> bool:
        """Wait for work; whether there will be any more."""
        with self.lock:
            self.lock.wait_for(self._something)
            return not self._closed and (self._busy() or not self._draining)

    def _busy(self) -> bool:
        return bool(self._jobs or self._waiting or self._running)

    def _something(self) -> bool:
        unused = any(holder.users == 0 for holder in self._retired)
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
        with self.lock:
            waiting = [*self._waiting]
        for request in waiting:
            self._ended(request)
        with self.lock:
            self._waiting = deque(each for each in self._waiting if not each.answer.done)
            free = self._limits.slots - len(self._running)
            taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._running.update(taken)
        lanes: dict[str, list[Request]] = {}
        for request in taken:
            lanes.setdefault(request.adapter.lane, []).append(request)
        for lane, requests in lanes.items():
            self._guarded(requests, partial(self._begin, lane, requests))

    def _begin(self, lane: str, requests: list[Request]) -> None:
        device = self._fleet.model.device
        batch = Batch(requests, self._forward, pad_id=self._pad, device=device)
        self._tell(batch)
        if batch.rows and lane in self._batches:
            self._batches[lane].join(batch)
        elif batch.rows:
            self._batches[lane] = batch

    def _step(self, lane: str) -> None:
        batch = self._batches[lane]

        def forward() -> None:
            batch.step()
            self._tell(batch)

        if not self._guarded(batch.rows, forward) or not batch.rows:
            del self._batches[lane]

    def _guarded(self, requests: Sequence[Any], work: Callable[[], None]) -> bool:
        """Whether it went well; what fails ends its own requests and nothing else."""
        mine = [*requests]
        try:
            work()
        except Exception as error:
            LOG.exception("a batch of %d failed", len(mine))
            message = f"The model failed: {type(error).__name__}. Ask again, or see the log."
            for request in mine:
                self._end(request, error=Refused(message, status=500, code="model_failed"))
            return False
        return True

    def _forward(self, rows: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if rows[0].time is not None:
            times = torch.tensor([row.time for row in rows])
            inputs["timestamps"] = times.to(inputs["input_ids"].device)
        return self._fleet.forward([row.adapter for row in rows], inputs)

    def _tell(self, batch: Batch) -> None:
        """Hand the new tokens on; let those go that are at their end."""
        both = zip(batch.rows, batch.tokens, strict=True)
        going = [i for i, (row, token) in enumerate(both) if self._goes_on(row, token)]
        if not going:
            batch.rows = []
        elif len(going) < len(batch.rows):
            batch.keep(going)

    def _goes_on(self, request: Any, token: int) -> bool:
        """Whether the answer goes on after this token."""
        if self._ended(request):
            return False
        answer, pieces = request.answer, request.pieces
        if answer.first is None:
            answer.first = time.monotonic() - answer.began
        ends = token in self._ends
        if not ends:
            answer.completion_tokens += 1
            answer.say(pieces.add(token))
        full = answer.completion_tokens >= request.max_tokens
        if not (ends or full or pieces.stopped):
            return True
        answer.say(pieces.end())
        self._end(request, "stop" if ends or pieces.stopped else "length")
        return False

    def _ended(self, request: Request) -> bool:
        """Whether nobody wants the answer any more, or it takes too long."""
        if request.answer.cancelled:
            self._end(request)
        elif request.answer.out_of_time():
            self._end(request, error=too_late(self._limits.seconds))
        elif request.broken:
            message = f"The scores of {request.answer.ask.model} are not finite. See its training."
            self._end(request, error=Refused(message, status=500, code="model_failed"))
        return request.answer.done

    def _end(
        self, request: Request, finish: Finish | None = None, *, error: Exception | None = None
    ) -> None:
        if request.answer.done:
            return
        with self.lock:
            request.holder.users -= 1
            self._running.discard(request)
        if finish:
            self.pace += 0.1 * (time.monotonic() - request.answer.began - self.pace)
        request.answer.close(finish, error)

    def _take_off(self) -> None:
        with self.lock:
            unused = [holder for holder in self._retired if holder.users == 0]
            self._retired = [holder for holder in self._retired if holder.users]
        for holder in unused:
            try:
                self._fleet.drop(holder.adapter)
            except Exception:
                LOG.exception("an adapter was not taken off")

    def _give_up(self) -> None:
        """End what is still there, when the thread must end."""
        with self.lock:
            self._draining = self._closed = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
        self._batches.clear()
        stopped = Refused("The server has stopped. Ask another one.", status=503, retry_after=5)
        for request in left:
            self._end(request, error=stopped)
        for _, done in self._jobs:
            done.set_exception(_closed())


def _closed() -> GemmateError:
    return GemmateError("The engine is closed. Start another one.")
