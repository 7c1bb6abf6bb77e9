"""A question to a served model, and its answer while it is written."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Literal

from gemmate_lib.serve.limits import Refused

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Ask:
    """What to complete, by which model, and how; None: as the run's own settings say.

    temperature: 0 is greedy. seed: None draws one. timestamp: ms since the Unix epoch, UTC.
    """

    model: str
    prompt: str
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    timestamp: int | None = None
    stop: tuple[str, ...] = ()


class Answer:
    """Pieces of text as they are made: iterate over it, in a thread or in a coroutine.

    One reader at a time. Joined, the pieces are the whole answer. Afterwards `finish` says why it
    ended: `stop`, `length`, or None where it was cancelled.
    """

    def __init__(self, ask: Ask, *, prompt_tokens: int, seconds: float) -> None:
        self.ask, self.prompt_tokens = ask, prompt_tokens
        self.completion_tokens = 0
        self.finish: Finish | None = None
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.first: float | None = None  # seconds until the first token
        self.cancelled = False
        self.done = False
        self._error: Exception | None = None
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Want no more of it: its slot is free after the step that is under way."""
        self.cancelled = True

    def text(self) -> str:
        """Wait for the whole answer. Raises: Refused where there is none."""
        return "".join(self)

    def __iter__(self) -> Iterator[str]:
        """Wait for each piece."""
        at = 0
        while True:
            with self._changed:
                while not self.done and len(self._pieces) == at:
                    self._changed.wait()
                new, done = self._pieces[at:], self.done
            yield from new
            at += len(new)
            if done and at == len(self._pieces):
                break
        self._raise()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Await each piece."""
        loop, changed, at = asyncio.get_running_loop(), asyncio.Event(), 0
        self._waiter = loop, changed
        while True:
            changed.clear()
            new, done = self._pieces[at:], self.done
            for piece in new:
                yield piece
            at += len(new)
            if done and at == len(self._pieces):
                break
            if not new:
                await changed.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error:
            raise self._error

    # What follows is the worker's.

    def say(self, piece: str) -> None:
        """Hand a piece on."""
        if piece:
            with self._changed:
                self._pieces.append(piece)
            self._wake()

    def close(self, finish: Finish | None = None, error: Exception | None = None) -> None:
        """Say that there will be no more."""
        if not self.done:
            with self._changed:
                self.finish, self._error, self.done = finish, error, True
            self._wake()

    def out_of_time(self) -> bool:
        """Whether it has taken longer than a request may."""
        return time.monotonic() > self.deadline

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._waiter:
            loop, changed = self._waiter
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # its loop is closed: nobody reads any more
                self.cancel()


def too_late(seconds: float) -> Refused:
    """What is said where a request takes too long."""
    message = f"The answer was not ready after {seconds:g} s. Ask for fewer tokens."
    return Refused(message, status=504, code="timeout")
