"""HTTP/1.1 as uvicorn speaks it, with a client that is slow to say what it wants sent away.

uvicorn 0.54 waits for the head of a request for ever, so a few silent clients would hold every
connection there may be. Delete this when the canary in tests/integration/test_serve_api.py fails.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10  # seconds for the head of a request, and between two requests


class Impatient(H11Protocol):
    """A connection that is closed where no whole head of a request comes."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Wait on, or no more."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        if self._timer and not self._waits():
            self._timer.cancel()
            self._timer = None
        elif self._waits() and not self._timer:
            self._timer = self.loop.call_later(PATIENCE, self._late)

    def _late(self) -> None:
        self._timer = None
        if self._waits() and not self.transport.is_closing():
            self.transport.close()
