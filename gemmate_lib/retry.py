"""What the Hub or a connection fails at for the moment is tried again, within bounds.

huggingface_hub repeats some of its requests itself: those are not repeated once more.
"""

import contextlib
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

# At most so many repeats, and so many seconds of waiting in all; each wait is twice the last.
REPEATS, PATIENCE = 5, 600.0
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
SILENCE = 120.0  # seconds without a byte, after which a connection counts as cut
# What passes by itself: statuses, and names, because the HTTP client under huggingface_hub changes.
# 409 and 412: somebody else commits at this moment.
PASSING = re.compile(r"408|409|412|429|5\d\d|(Connect|Read|Write|RemoteProtocol)Error|\w+Timeout")
# What huggingface_hub 2.4 repeats five times itself: with ours on top it would be thirty times.
# A test counts them; when it fails, compare with the callers of http_backoff in its source.
REPEATED = re.compile(
    r"(PUT|POST .*(/preupload/|/info/lfs/)|GET .*/tree/).* (408|429|50[0234]|[A-Z]\w+)"
    r"|HEAD .* (408|429|50[0234]|ConnectError|\w+Timeout)"
    r"|GET .*/resolve/.* (408|429|ConnectError|RemoteProtocolError|\w+Timeout)"
)
SECRET = re.compile(r"\?[^\s'\"]+|\b(hf|api_org)_\w{16,}")  # what signs an address, and tokens

T = TypeVar("T")
log = logging.getLogger("gemmate")
_jitter = random.Random()  # not the global one, on which a run may depend


def patiently(act: Callable[[], T], *, doing: str) -> T:
    """Do it, and again where it failed for the moment; `doing`: what, for the log.

    Raises: what `act` raises, where that does not pass by itself, or not in time.
    """
    repeat, waited = 0, 0.0
    while True:
        try:
            with _client(doing):
                return act()
        except Exception as error:
            cause = root(error)
            pause = _pause(cause, repeat)
            if pause is None or repeat == REPEATS or waited + pause > PATIENCE:
                raise
        repeat, waited = repeat + 1, waited + pause
        again = f"Trying again in {pause:.0f} s ({repeat} of {REPEATS})."
        log.warning("Cannot %s: %s. %s", doing, words(cause), again)
        time.sleep(pause)


@contextlib.contextmanager
def _client(doing: str) -> Iterator[None]:
    """Let huggingface_hub wait for SILENCE, not for ever, and tell in our log what it repeats."""
    from huggingface_hub import get_session

    def tell(record: logging.LogRecord) -> bool:
        log.warning("Cannot %s yet: %s.", doing, words(record.getMessage()))
        return False

    names = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
    session = get_session()
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, session, "timeout", session.timeout)
        session.timeout = SILENCE
        for logger in map(logging.getLogger, names):
            logger.addFilter(tell)
            stack.callback(logger.removeFilter, tell)
        yield


def _pause(error: Exception, repeat: int) -> float | None:
    """Seconds until the next try; None where it is in vain, or huggingface_hub has tried."""
    if not isinstance(error, json.JSONDecodeError):  # which is the page of some proxy
        what = str(status(error) or type(error).__name__)
        asker = getattr(error, "response", None) or error  # an HfHubHTTPError has no `request`
        if not PASSING.fullmatch(what) or not (request := getattr(asker, "request", None)):
            return None
        if REPEATED.fullmatch(f"{request.method} {request.url.path} {what}"):
            return None
    if (asked := asked_to_wait(error)) is not None:
        return asked + _jitter.random()
    return min(LONGEST_WAIT, FIRST_WAIT * 2**repeat) * _jitter.uniform(0.5, 1.0)


def status(error: Exception) -> int | None:
    """The status of the answer behind an exception; hf_xet has it in its words alone."""
    said = re.search(r"HTTP status \w+ error \((\d{3}) ", str(error))
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code or (int(said[1]) if said else None)


def asked_to_wait(error: Exception) -> int | None:
    """The seconds that the Hub asks for: Retry-After, or the end of a used up RateLimit."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    used_up = re.search(r"\br=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    seconds = headers.get("Retry-After", "").strip() or (used_up[1] if used_up else "")
    return int(seconds) if seconds.isdigit() else None


def root(error: Exception) -> Exception:
    """What the Hub or the connection said, out of what huggingface_hub wrapped around it."""
    inner: BaseException | None = error
    while isinstance(inner, Exception):
        if status(inner) or "http" in type(inner).__module__:
            return inner
        inner = inner.__cause__
    return error


def words(said: object) -> str:
    """One line of what was said, without what nobody should read."""
    if isinstance(said, json.JSONDecodeError):
        return "what answered is not the Hub"
    text = " ".join(re.sub(r"For more information check: \S+", "", str(said)).split())
    return (SECRET.sub("…", text) or type(said).__name__)[:200].rstrip(".")
