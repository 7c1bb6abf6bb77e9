"""Tags of a registry, followed: where one moves, the server moves, and drops no request.

What cannot be fetched, verified or loaded leaves the version before it in its place. It is said in
the log, in /readyz and in /metrics, and tried again, after ever longer waits.
"""

import logging
import threading
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from gemmate_lib.config import GemmateError
from gemmate_lib.registry import Registry
from gemmate_lib.serve.engine import Engine
from gemmate_lib.sft import Run, load_run
from gemmate_lib.tags import check_tag, short
from gemmate_lib.versions import Version, cache_home

LOG = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0  # seconds until a version that failed is tried again


@dataclass(frozen=True)
class Followed:
    """A tag's version that is served; `fault`: why that is not the one it names; None: it is."""

    version: str
    fault: str | None = None


@dataclass(frozen=True)
class _Failed:
    version: str
    wait: float
    until: float


class TagFollower:
    """Serve under each tag's name the version that it names."""

    def __init__(
        self,
        registry: str | Path | None,
        tags: Iterable[str],
        *,
        taken: Container[str] = (),
        every_s: float = 5.0,
        cache: Path | None = None,
    ) -> None:
        """Fetch what the tags name now into `runs`, for an engine to begin with.

        Raises: GemmateError where one names no sound version, or a name that is taken.
        """
        if registry is None:
            raise GemmateError("Tags are of a registry. Give --registry, a folder or a URL.")
        self._registry, self._every = Registry(registry), every_s
        self._cache = cache or cache_home()
        self.runs: dict[str, Run] = {}
        for tag in dict.fromkeys(tags):
            if tag in taken:
                raise GemmateError(f"A run is called {tag}, as the tag is. Give it a --name.")
            self.runs[tag] = self._fetch(self._registry.find(check_tag(tag)))
        self._state = {tag: Followed(run.directory.name) for tag, run in self.runs.items()}
        self._failed: dict[str, _Failed] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _fetch(self, version: Version) -> Run:
        return load_run(self._registry.versions.fetch(version, self._cache))

    def state(self) -> dict[str, Followed]:
        """What is served for each tag."""
        return dict(self._state)

    def is_behind(self, tag: str) -> bool:
        """Whether a tag names another version than is served, or cannot be read."""
        return self._state[tag].fault is not None

    def start(self, engine: Engine) -> None:
        """Look from now on; the engine serves `runs` by now."""
        self._thread = threading.Thread(
            target=self._follow, args=(engine,), name="gemmate-tags", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a download that hangs is not waited for."""
        self._stop.set()
        if self._thread:
            self._thread.join(5)

    def _follow(self, engine: Engine) -> None:
        while not self._stop.wait(self._every):
            self.look(engine)

    def look(self, engine: Engine) -> None:
        """Look once: serve what was tagged meanwhile; of what fails the log tells once."""
        for tag, known in self.state().items():
            try:
                fault = self._move(engine, tag, known)
            except GemmateError as error:
                fault = str(error)
            except Exception as error:  # of a library: the thread must live on
                fault = f"{type(error).__name__}: {error}"
                LOG.debug("%s", fault, exc_info=error)
            if fault and fault != known.fault:
                LOG.warning("%s stays at %s: %s", tag, short(self._state[tag].version), fault)
            self._state[tag] = Followed(self._state[tag].version, fault)

    def _move(self, engine: Engine, tag: str, known: Followed) -> str | None:
        """Serve what the tag names; the fault of before where it is not yet time to try again."""
        found = self._registry.tag(tag)
        if found is None:
            raise GemmateError(f"There is no tag {tag} any more. Put it back.")
        wanted, failed = found.version, self._failed.get(tag)
        if wanted == known.version:
            self._failed.pop(tag, None)
            return None
        wait = FIRST_WAIT
        if failed and failed.version == wanted:
            if time.monotonic() < failed.until:
                return known.fault
            wait = min(LONGEST_WAIT, failed.wait * 2)
        self._failed[tag] = _Failed(wanted, wait, time.monotonic() + wait)
        engine.add(tag, self._fetch(self._registry.versions.read(wanted)))
        del self._failed[tag]
        self._state[tag] = Followed(wanted)
        LOG.info("%s: %s -> %s", tag, short(known.version), short(wanted))
        return None
