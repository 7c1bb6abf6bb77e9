"""From the folders of runs to an engine that serves them, and a folder that is followed."""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gemmate_lib import machine
from gemmate_lib.config import GemmateError
from gemmate_lib.serve.engine import Engine
from gemmate_lib.serve.fleet import refuse_method
from gemmate_lib.serve.limits import Limits
from gemmate_lib.sft import Run, load_run

LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


def name_runs(folders: Sequence[Path], names: Sequence[str] = ()) -> dict[str, Run]:
    """Load runs, by the names given or else by those of their folders.

    Raises: GemmateError where there is none, or two have one name, or it is no plain name.
    """
    if names and len(names) != len(folders):
        raise GemmateError(f"{len(names)} names for {len(folders)} runs. Give one each, or none.")
    found: dict[str, Run] = {}
    for folder, name in zip(folders, names or [f.resolve().name for f in folders], strict=True):
        check_name(name)
        if name in found:
            both = f"{found[name].directory} and {folder}"
            raise GemmateError(f"{both} would both be {name}. Name them: --name A --name B.")
        found[name] = load_run(folder)
    return found


def runs_to_begin_with(folder: Path | None) -> dict[str, Run]:
    """The first run in a folder, whose base is the one to load.

    Raises: GemmateError where there is none.
    """
    names = [] if folder is None else [*finished_runs(folder)]
    if folder is None or not names:
        where = "No run is named" if folder is None else f"{folder} holds no run"
        raise GemmateError(f"{where}. Make one with: gemmate finetune quotes --out runs/mine")
    return name_runs([folder / names[0]])


def check_name(name: str) -> str:
    """The name. Raises: GemmateError for one that is not letters, digits, `.`, `_` and `-`."""
    if not _NAME.fullmatch(name):
        raise GemmateError(f"{name!r} is no name for a model. Use letters, digits, ., _ and -.")
    return name


def open_engine(runs: Mapping[str, Run], *, limits: Limits | None = None) -> Engine:
    """Load the base of the first run, once, and serve all of them over it.

    Raises: GemmateError for a run of another base, or one that cannot be served.
    """
    from gemmate_lib.models import load_base

    for run in runs.values():
        refuse_method(run)  # before anything is loaded
    first = next(iter(runs.values())).experiment
    machine.speak(first.tracking.log_level)
    machine.prepare(seed=first.seed, threads=first.threads, deterministic=first.deterministic)
    held = first.model.model_copy(update={"temporal_kind": None})
    engine = Engine(load_base(held), held=held, limits=limits)
    try:
        for name, run in runs.items():
            engine.add(name, run)
    except BaseException:
        engine.close(0)
        raise
    return engine


class Follower:
    """A folder of runs, followed: what appears in it is served, what goes is not any more."""

    def __init__(
        self, engine: Engine, folder: Path, *, seconds: float = 1.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Follow by `look`, or by a thread between `start` and `stop`; seconds between looks."""
        self._say = say
        self._engine, self._folder, self._seconds = engine, folder, seconds
        self._known: dict[str, tuple[int, int]] = {}  # what was seen, also if it was refused
        self._served: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="gemmate-follower", daemon=True)

    def start(self) -> None:
        """Look now, and from now on."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.look()
            except Exception:  # a folder that cannot be read now may be read later
                LOG.exception("could not look into %s", self._folder)

    def look(self) -> None:
        """Serve what is new or was made again, take away what is gone; a bad run is named once."""
        found = finished_runs(self._folder)
        for name in sorted(self._known.keys() - found.keys()):
            del self._known[name]
            if name in self._served:
                self._served.discard(name)
                self._engine.remove(name)
                self._say(f"- {name}")
        for name, stamp in found.items():
            if self._known.get(name) != stamp:
                self._known[name] = stamp
                self._add(name)

    def _add(self, name: str) -> None:
        taken = {served.name for served in self._engine.models()} - self._served
        try:
            if name in taken:
                raise GemmateError(f"{name} is served already, from elsewhere. Rename the folder.")
            self._engine.add(check_name(name), load_run(self._folder / name))
            self._served.add(name)
            self._say(f"+ {name}")
        except GemmateError as error:
            LOG.warning("%s is not served: %s", name, error)


def finished_runs(folder: Path) -> dict[str, tuple[int, int]]:
    """The runs in a folder whose manifest is written, which comes last: its time and size."""
    found = {}
    for manifest in sorted(folder.glob("*/manifest.json")):
        try:
            stat = manifest.stat()
        except OSError:  # it went just now
            continue
        if not manifest.parent.name.startswith("."):
            found[manifest.parent.name] = (stat.st_mtime_ns, stat.st_size)
    return found
