"""Out of memory, said in numbers: what was needed, and which batch takes the same steps in less."""

import contextlib
import re
from collections.abc import Iterator

from gemmate_lib import machine
from gemmate_lib.config import Experiment, GemmateError

_UNITS = {"bytes": 2**-20, "b": 2**-20, "kib": 2**-10, "mib": 1.0, "gib": 2.0**10}


class OutOfMemory(GemmateError):
    """What a run needed and this machine did not have."""


def asked_mib(error: BaseException) -> float | None:
    """MiB of the allocation that failed, from torch's message; None for any other error."""
    if isinstance(error, MemoryError):
        return 0.0
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if not (isinstance(error, RuntimeError) and found):
        return None
    return float(found[1]) * _UNITS.get(found[2].lower(), 0.0)


def smaller_batch(batch: int, *, base: float, need: float, room: float) -> tuple[int, float]:
    """The largest divisor of `batch` below it that fits, and the MiB it needs.

    base: MiB before the first step; need: MiB for `batch` rows; room: MiB there are. What lies
    above the base grows with the rows.
    """
    needs = {b: base + (need - base) * b / batch for b in range(1, batch) if batch % b == 0}
    fitting = [b for b, mib in needs.items() if mib <= room] or [1]
    return max(fitting), needs[max(fitting)]


@contextlib.contextmanager
def said_in_numbers(experiment: Experiment) -> Iterator[None]:
    """Turn a failed allocation while training into what was needed and what would fit.

    Raises: OutOfMemory.
    """
    base = machine.peak_memory_mib()
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        asked = asked_mib(error)
        if asked is None:
            raise
        raise OutOfMemory(_advice(experiment, base=base, asked=asked)) from error


def _advice(experiment: Experiment, *, base: float, asked: float) -> str:
    training, facts = experiment.training, machine.read_facts()
    room = 2**10 * (facts.gpu_memory_gib or facts.ram_gib)
    batch, times = training.batch_size, training.gradient_accumulation_steps
    need = machine.peak_memory_mib() + asked
    shape = f"{batch} rows of up to {experiment.dataset.max_length} tokens"
    said = (
        f"Out of memory: {shape} need {_gib(need)}, {_gib(base)} of it before the first step; "
        f"here are {_gib(room)}. "
    )
    if batch == 1:
        length = experiment.dataset.max_length // 2
        return said + (f"Set training.gradient_checkpointing=true, or dataset.max_length={length}.")
    fits, mib = smaller_batch(batch, base=base, need=need, room=room)
    return said + (
        f"The same steps in about {_gib(mib)}: training.batch_size={fits} "
        f"training.gradient_accumulation_steps={times * batch // fits}."
    )


def _gib(mib: float) -> str:
    return f"{mib / 2**10:.1f} GiB"
