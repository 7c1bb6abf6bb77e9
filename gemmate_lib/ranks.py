"""The processes of one run: which of them this is, and what all of them must agree on.

A rank is the number of a process, from 0; the world is how many there are. Only rank 0 writes.
What the ranks tell each other here goes over gloo, by the CPU, whatever computes.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmate_lib.settings import GemmateError

# What whoever started the processes asked for; what there is may be another matter.
ASKED, STRATEGY = "GEMMATE_PROCESSES", "GEMMATE_STRATEGY"


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; alone by default, and then nothing here costs a thing.

    strategy: none, ddp (every rank has all weights) or fsdp (every rank has a share of each).
    """

    rank: int = 0
    world: int = 1
    strategy: str = "none"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def backend(self) -> str:
        """What carries the gradients from rank to rank: gloo on CPUs, nccl on GPUs."""
        import torch.distributed as dist

        return str(dist.get_backend()) if self.several else "none"

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order; each rank must ask."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.gather(None)

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Raise GemmateError, on every rank, naming the first rank whose facts are not rank 0's."""
        everyone = self.gather(dict(facts))
        for rank, theirs in enumerate(everyone):
            keys = sorted({*everyone[0], *theirs})
            wrong = [key for key in keys if theirs.get(key) != everyone[0].get(key)]
            if wrong:
                both = f"{_short(theirs.get(wrong[0]))} there, {_short(everyone[0].get(wrong[0]))}"
                raise GemmateError(f"Rank {rank} has another {wrong[0]} than rank 0: {both} here. "
                                   f"{remedy}")  # fmt: skip

    def share(self, folder: Path) -> None:
        """Raise GemmateError, on every rank, where one does not see a folder of rank 0's."""
        mark = folder / f".seen-{self.gather(uuid.uuid4().hex)[0]}"
        if self.first:
            mark.touch()
        self.wait()
        seen = self.gather(mark.is_file())
        if self.first:
            mark.unlink()
        if not all(seen):
            problem = f"Rank {seen.index(False)} does not see {folder}, where rank 0 writes"
            raise GemmateError(f"{problem}. Give --out a folder that every machine shares.")


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 60 else f"{text[:12]}…"


ALONE = Ranks()


def join(device: str) -> Ranks:
    """Meet the processes that this one was started with by torchrun; ALONE where it was not.

    device: of the experiment; auto, cpu or cuda.
    Raises: GemmateError where there are not as many as asked for, or a rank has no GPU.
    """
    world, asked = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get(ASKED, 0))
    rank = int(os.environ.get("RANK", 0))
    if asked and asked != world:
        # accelerate 1.15: `accelerate launch --cpu --num_processes 2` starts one, without a word.
        problem = f"{asked} processes were asked for, and rank {rank} finds a world of {world}"
        raise GemmateError(f"{problem}. Start them by gemmate finetune --processes or torchrun.")
    if world == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            _take_gpu(rank, int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return Ranks(rank, world, os.environ.get(STRATEGY, "ddp"))


def _take_gpu(rank: int, local: int, count: int) -> None:
    """Give a rank the GPU of its number. Raises: GemmateError where there is none."""
    import torch

    if local >= count:
        raise GemmateError(f"Rank {rank} has no GPU of its own: this machine has {count}. Start "
                           f"{count} processes here.")  # fmt: skip
    torch.cuda.set_device(local)
