"""One run on several processes: torchrun's engine starts them, each does what one alone would do.

What the processes must agree on is looked at by them (gemmate_lib/ranks.py, sharing.py). Here they
are started, watched and ended together, and what ended them is said in one sentence.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmate_lib import machine
from gemmate_lib.budget import Spent
from gemmate_lib.callbacks import Interrupted
from gemmate_lib.config import Experiment, GemmateError
from gemmate_lib.sft import Run, check_new, load_run
from gemmate_lib.sharding import Strategy, check_strategy
from gemmate_lib.sharing import shares

CHATTER = ("agent.server.api", "multiprocessing.api", "agent.server.local_elastic_agent")
ROOT = Path(__file__).parents[1]
# This library, not another one that is installed, wherever we stand; quiet before it is heavy.
START = (
    "import sys; sys.path.insert(0, {!r}); from gemmate_lib.machine import quiet; quiet(); "
    "from gemmate_lib.ranked import main; main()"
)
PATIENCE = (
    "600"  # seconds to save in once told to stop; torchrun's own 30 are few for a large model
)


@dataclass(frozen=True)
class Cluster:
    """Which processes train: so many on each machine, on how many machines, and which is this.

    rendezvous: where the machines meet, HOST:PORT of the one with node_rank 0.
    """

    processes: int = 2
    strategy: Strategy = "ddp"
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None

    @property
    def world(self) -> int:
        """All processes."""
        return self.processes * self.nodes


def check_cluster(cluster: Cluster, experiment: Experiment) -> None:
    """Raise GemmateError where the processes cannot be started, or could not share the steps."""
    facts, training = machine.read_facts(), experiment.training
    check_strategy(cluster.strategy, experiment, facts, processes=cluster.processes)
    shares(training.batch_size, training.gradient_accumulation_steps, cluster.world)
    if not 0 <= cluster.node_rank < cluster.nodes:
        last = cluster.nodes - 1
        raise GemmateError(
            f"There is no machine {cluster.node_rank}. Give --node-rank 0 to {last}."
        )
    if cluster.nodes > 1 and not cluster.rendezvous:
        problem = f"{cluster.nodes} machines need a place to meet"
        raise GemmateError(f"{problem}. Give all of them --rendezvous HOST:PORT of machine 0.")
    if cluster.rendezvous:
        _check_port(cluster.rendezvous, ours=cluster.node_rank == 0)


def _check_port(rendezvous: str, *, ours: bool) -> None:
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise GemmateError(f"{rendezvous!r} is no HOST:PORT. Write it as 10.0.0.1:29500.")
    if not ours:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            why = f"The port {port} cannot be listened at: {error.strerror}"
            raise GemmateError(f"{why}. Give --rendezvous another port.") from None


def launch(
    experiment: Experiment,
    *,
    out: str | Path,
    processes: int = 2,
    strategy: Strategy = "ddp",
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    resume: str | None = None,
    allow_changed: Collection[str] = (),
    show: bool = False,
) -> Run:
    """Fine-tune on several processes and return the run, whose losses are those of one process.

    processes: on this machine; with `nodes` machines call it on each, with its `node_rank`.
    show: print each step.
    Raises: GemmateError naming the rank that failed and why; Interrupted after a signal, and Spent
        at the end of the budget, once the processes have saved.
    """
    cluster = Cluster(processes, strategy, nodes, node_rank, rendezvous)
    resume = resume or experiment.checkpoint.resume
    check_cluster(cluster, experiment)
    if node_rank == 0:
        check_new(Path(out), resume=resume)
    order = {
        "experiment": experiment.model_dump(mode="json"),
        "out": str(Path(out).resolve()),
        "resume": resume,
        "allow_changed": list(allow_changed),
        "world": cluster.world,
        "strategy": strategy,
        "show": show,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "order.json").write_text(json.dumps(order), "utf-8")
        with _agent_tamed():
            _run(cluster, folder)
    found = load_run(out)
    return Run(found.directory, found.experiment, found.manifest, found=False)


def _run(cluster: Cluster, folder: Path) -> None:
    """Start the processes and wait for their end. Raises: as `launch` does."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", PATIENCE)
    alone = cluster.rendezvous is None
    config = LaunchConfig(
        min_nodes=cluster.nodes,
        max_nodes=cluster.nodes,
        nproc_per_node=cluster.processes,
        run_id="gemmate",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else str(cluster.rendezvous),
        rdzv_configs={} if alone else {"rank": cluster.node_rank},
        local_addr="localhost" if alone else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    try:
        elastic_launch(config, sys.executable)("-c", START.format(str(ROOT)), str(folder))
    except SignalException:
        raise _why(folder, {}) from None
    except ChildFailedError as error:
        codes = {rank: each.exitcode for rank, each in error.failures.items()}
        raise _why(folder, codes) from None


def _why(folder: Path, codes: dict[int, int]) -> BaseException:
    """What ended the processes: a signal from outside, or the first that failed, by its rank."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    for rank, number in killed.items():
        name = signal.Signals(number).name
        remedy = "Look whether memory ran out" if name == "SIGKILL" else "Start the run again"
        return GemmateError(f"Rank {rank} was ended by {name}, and the others with it. {remedy}.")
    notes = [json.loads(file.read_text("utf-8")) for file in folder.glob("rank-*.json")]
    for note in sorted(notes, key=lambda each: (each["kind"] != "mendable", each["at"])):
        if note["kind"] == "interrupted":
            return Interrupted(note["number"], note["step"])
        if note["kind"] == "spent":
            return Spent(note["said"])
        if note["kind"] == "mendable":
            return GemmateError(note["said"])
        sys.stderr.write(note["traceback"])
        return GemmateError(f"Rank {note['rank']} failed: {note['said']}. Its traceback is above.")
    return GemmateError(f"The processes ended with {codes or 'a signal'}. Start the run again.")


@contextlib.contextmanager
def _agent_tamed() -> Iterator[None]:
    """Let torch's agent be quiet: we say what happens. It takes signals over; take them back."""
    import torch.distributed.launcher.api  # noqa: F401  (it sets their levels)

    noisy = [logging.getLogger(f"torch.distributed.elastic.{name}") for name in CHATTER]
    levels = [each.level for each in noisy]
    for each in noisy:
        each.setLevel(logging.CRITICAL)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before: dict[Any, Any] = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)
        with contextlib.suppress(ValueError):  # not in the main thread: nobody took them
            for number, handler in before.items():
                signal.signal(number, handler)
