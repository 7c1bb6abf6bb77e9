"""One training on several processes: who gets which rows, and the proof that all stay alike.

The rows of a step are those that one process would take, in its order. The loss is that of the
step's tokens, whichever rank has them, so the curve is that of one process.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from gemmate_lib.config import GemmateError
from gemmate_lib.ranks import Ranks
from gemmate_lib.sharding import is_sharded, put_together

CHECK_EVERY = 50  # optimizer steps between two looks at the weights of all ranks
SAME = "Give every process the same experiment, files, versions and machine."


def shares(batch: int, accumulation: int, world: int) -> tuple[int, int]:
    """Rows at a time and batches to a step for each of `world` ranks: the same rows to a step.

    Raises: GemmateError where the rows of a step cannot be divided among them.
    """
    mine, rest = divmod(batch * accumulation, world)
    if rest:
        raise GemmateError(
            f"{batch * accumulation} rows to a step cannot be shared evenly by {world} processes. "
            f"Set training.batch_size to a multiple of {world}, or take fewer processes."
        )
    rows = max(n for n in range(1, min(batch, mine) + 1) if mine % n == 0)
    return rows, mine // rows


class Filled(torch.utils.data.Sampler[int]):
    """The order of a single process, filled up at its end so that the ranks get equally many.

    accelerate 1.15, `BatchSamplerShard`, would begin again with the first rows instead, and train
    on those twice. filler: the number of a row that has no labels.
    """

    def __init__(self, order: Any, *, block: int, filler: int) -> None:
        self.order, self.block, self.filler = order, block, filler

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        """The rows of an epoch and what fills them up."""
        return -(-len(self.order) // self.block) * self.block

    def __iter__(self) -> Iterator[int]:
        """The numbers of the rows, those of one step after those of another."""
        yield from self.order
        yield from [self.filler] * (len(self) - len(self.order))


def share_rows(trainer: Any, ranks: Ranks, *, seed: int, order: Any = None) -> None:
    """Give each rank of a trainer its share of each batch, and all of them the same evaluation.

    order: the sampler of a single process; None: the one that accelerate would make of the seed.
    """
    from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
    from datasets import Dataset, concatenate_datasets
    from torch.utils.data import DataLoader

    rows = trainer.train_dataset
    blank = rows[:1]
    blank["labels"] = [[-100] * len(labels) for labels in blank["labels"]]
    filler = Dataset.from_dict(blank, features=rows.features)
    trainer.train_dataset = concatenate_datasets([rows, filler])
    sampler = Filled(
        order or SeedableRandomSampler(range(len(rows)), data_seed=seed),
        block=trainer.args.per_device_train_batch_size * ranks.world,
        filler=len(rows),
    )
    trainer._get_train_sampler = lambda *_: sampler

    def every_row(*_: Any) -> Any:
        batch = trainer.args.per_device_eval_batch_size
        found = DataLoader(trainer.eval_dataset, batch, collate_fn=trainer.data_collator)
        made = prepare_data_loader(
            found, device=trainer.args.device, num_processes=1, process_index=0, put_on_device=True
        )
        made._drop_last = True  # or accelerate takes what the ranks have in common for padding
        return made

    # The mean over a batch is that of its tokens: cut into other batches, another loss comes out.
    trainer.get_eval_dataloader = every_row


def checksum(model: Any) -> str:
    """SHA-256 over the trained weights; those that are shared out are put together first."""
    found = hashlib.sha256()
    for name, weight in sorted(put_together(model).items()):
        found.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_wrapping(model: Any, ranks: Ranks) -> None:
    """Raise GemmateError where a model is not held as the strategy says.

    model: what the trainer made of it, whose gradients are to be exchanged.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    kind = "nobody" if type(model).__module__.startswith(("peft", "transformers")) else ""
    kind = kind or type(model).__name__
    problem = f"Rank {ranks.rank} should train by {ranks.strategy}, and its gradients"
    if not is_sharded(ranks.strategy):
        if not isinstance(model, DistributedDataParallel):
            raise GemmateError(f"{problem} are shared by {kind}. Start it with torchrun.")
        return
    if not isinstance(model, FSDPModule):
        remedy = "FSDP2 needs a GPU for each rank: take --strategy ddp here"
        raise GemmateError(f"{problem} are shared by {kind}. {remedy}.")
    for name, weight in model.named_parameters():
        if not isinstance(weight, DTensor) or weight.device_mesh.size() != ranks.world:
            raise GemmateError(f"{problem} of {name} are not shared out among {ranks.world} ranks. "
                               "Take --strategy ddp.")  # fmt: skip


class Together(TrainerCallback):
    """Looks whether the ranks train one model: at the start, every so many steps, at the end."""

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self.trainer, self.ranks = trainer, ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at what the trainer made of the model, and at its weights."""
        check_wrapping(self.trainer.model_wrapped, self.ranks)
        torch.manual_seed(args.seed + 1_000_003 * self.ranks.rank)  # or all drop out the same
        self.compare(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the weights now and then."""
        if state.global_step % CHECK_EVERY == 0:
            self.compare(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the weights that will be saved."""
        self.compare(state.global_step)

    def compare(self, step: int) -> None:
        """Raise GemmateError, on every rank, where one has other weights."""
        weights = {f"state of the weights after step {step}": checksum(self.trainer.model)}
        self.ranks.agree(weights, "Their gradients were not exchanged: start them with torchrun.")
