"""Starting several processes: what is shipped builds, what cannot work is refused beforehand."""

import dataclasses
import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from trl import SFTConfig

from gemmate_lib import launch
from gemmate_lib.callbacks import Interrupted
from gemmate_lib.config import Facts, GemmateError, ModelConfig
from gemmate_lib.divergence import Watch
from gemmate_lib.fourbit import nf4_settings
from gemmate_lib.launch import Cluster, check_cluster
from gemmate_lib.models import load_base
from gemmate_lib.ranks import ALONE, join
from gemmate_lib.sampling import ByLength
from gemmate_lib.sharding import (
    FILES,
    STRATEGIES,
    check_storage,
    check_strategy,
    configuration,
    packed,
    trainer_settings,
)
from gemmate_lib.sharing import Filled, shares

Make = Callable[..., Any]
GPUS = Facts("cuda", (9, 0), 80.0, 128.0, 8)
SHIPPED = sorted(FILES.glob("*.yaml"))


def test_every_strategy_is_shipped_for_one_and_several_machines() -> None:
    wanted = {configuration(name, nodes=n) for name in STRATEGIES for n in (1, 2)}
    assert set(SHIPPED) == wanted and len(wanted) == 6


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_configuration_parses_and_builds(file: Path) -> None:
    found = load_config_from_file(str(file))  # refuses a key that it does not know
    assert (found.num_machines > 1) == file.stem.endswith("-nodes") == bool(found.main_process_ip)
    assert found.num_processes % found.num_machines == 0 and found.mixed_precision == "bf16"
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(found.fsdp_config) <= flags
    if not found.fsdp_config:
        assert found.distributed_type == "MULTI_GPU"
        return
    assert found.distributed_type == "FSDP"
    names = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    given = {k if k == "fsdp_version" else k.removeprefix("fsdp_"): v
             for k, v in found.fsdp_config.items()}  # fmt: skip
    assert set(given) <= names
    plugin = FullyShardedDataParallelPlugin(**given)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL" in str(plugin.state_dict_type)


# trl 1.16 knows the setting by its name from before transformers 5.23, as machine.quiet says.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is depr:FutureWarning")
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp-qlora"])
def test_the_trainer_reads_what_is_shipped(strategy: str, tmp_path: Path) -> None:
    """transformers 5.23 passes over a key of fsdp_config that it does not know."""
    given = trainer_settings(strategy, checkpointing=True)
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
    read = arguments.fsdp_plugin_args
    assert not arguments.gradient_checkpointing and not arguments.activation_checkpointing
    assert read["fsdp_version"] == 2 and read["activation_checkpointing"] is True
    assert set(given["fsdp_config"]) <= {"version", *read, "min_num_params", "xla", "xla_fsdp_v2",
                                         "xla_fsdp_grad_ckpt"}  # fmt: skip
    assert trainer_settings("ddp", checkpointing=True) == {"gradient_checkpointing": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharded_codes_are_stored_as_what_is_computed_in(dtype: Any) -> None:
    assert nf4_settings("nf4", dtype, sharded=True).bnb_4bit_quant_storage == dtype
    assert nf4_settings("nf4", dtype).bnb_4bit_quant_storage == torch.uint8


def test_codes_stored_as_floats_are_the_same_codes() -> None:
    """And the look at weights before the first step takes them for codes, not for numbers."""
    config = ModelConfig(id="tiny-gemma", quantization="nf4", device="cpu")
    plain, stored = load_base(config).model, load_base(config, sharded=True).model
    assert len(packed(stored)) == len(packed(plain)) > 0
    for (name, one), (_, other) in zip(packed(plain), packed(stored), strict=True):
        assert (one.dtype, other.dtype) == (torch.uint8, torch.float32), name
        assert torch.equal(one.flatten(), other.data.view(torch.uint8).flatten()), name
    packed(stored)[0][1].data.view(torch.uint8)[:] = 255  # what a NaN looks like
    Watch(None).on_train_begin(None, None, None, model=stored)
    with pytest.raises(GemmateError, match=r"q_proj.weight is stored in torch.uint8, and FSDP"):
        check_storage(plain, torch.float32)


REFUSED: dict[str, tuple[Cluster, dict[str, Any], Facts, str]] = {
    "uneven": (Cluster(3), {}, Facts(), "16 rows to a step cannot be shared evenly by 3"),
    "no GPU for FSDP": (
        Cluster(2, "fsdp2"), {}, Facts(), "on GPUs alone, and on CPUs falls back without a word"
    ),
    "an experiment for the CPU": (
        Cluster(2, "fsdp2"), {"model.device": "cpu"}, GPUS, "Take --strategy ddp here"
    ),
    "too few GPUs": (
        Cluster(16), {"model.device": "cuda"}, GPUS, "16 processes need a GPU each, and this .* 8"
    ),
    "4 bits under FSDP2": (
        Cluster(2, "fsdp2"), {"model.device": "cuda"}, GPUS,
        "held in 4 bits. Take --strategy fsdp-qlora",
    ),
    "FSDP-QLoRA without 4 bits": (
        Cluster(2, "fsdp-qlora"), {"model.device": "cuda", "model.quantization": "none"}, GPUS,
        "not in 4 bits. Take --strategy fsdp2, or set model.quantization=nf4",
    ),
    "checkpoints of shares": (
        Cluster(2, "fsdp-qlora"), {"model.device": "cuda", "checkpoint.save_every": 5}, GPUS,
        "Of sharded weights no checkpoints are kept",
    ),
    "unknown": (Cluster(2, "fsdp3"), {}, Facts(), "fsdp3"),  # type: ignore[arg-type]
    "no place to meet": (Cluster(1, nodes=2), {}, Facts(), "2 machines need a place to meet"),
    "no such machine": (Cluster(2, node_rank=1), {}, Facts(), "There is no machine 1"),
    "no port": (Cluster(1, nodes=2, rendezvous="host"), {}, Facts(), "'host' is no HOST:PORT"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_it_starts(
    name: str, experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, settings, facts, said = REFUSED[name]
    monkeypatch.setattr(launch.machine, "read_facts", lambda: facts)
    with pytest.raises(GemmateError, match=said):
        check_cluster(cluster, experiment(**settings))


def test_what_can_work_is_let_through(experiment: Make) -> None:
    on_gpu = experiment(**{"model.device": "cuda"})
    check_strategy("fsdp-qlora", on_gpu, GPUS, processes=8)
    check_strategy("ddp", on_gpu, GPUS, processes=8)
    check_cluster(Cluster(2), experiment())


def test_a_port_in_use_is_refused(experiment: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = Cluster(1, nodes=2, rendezvous=f"127.0.0.1:{port}")
        with pytest.raises(GemmateError, match=f"port {port} cannot be listened at: Address alre"):
            check_cluster(first, experiment())
        check_cluster(dataclasses.replace(first, node_rank=1), experiment())


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_shares_keep_the_rows_of_a_step(batch: int, accumulation: int, world: int) -> None:
    if batch * accumulation % world:
        with pytest.raises(GemmateError, match="cannot be shared evenly"):
            shares(batch, accumulation, world)
        return
    rows, times = shares(batch, accumulation, world)
    assert rows * times * world == batch * accumulation and rows <= batch
    assert world > 1 or (rows, times) == (batch, accumulation)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 12, 13])
@pytest.mark.parametrize("kind", ["drawn", "by length"])
def test_ranks_together_take_the_steps_of_one(kind: str, rows: int, epoch: int) -> None:
    def make() -> Any:
        if kind == "drawn":
            return SeedableRandomSampler(range(rows), data_seed=3)
        return ByLength([i % 5 for i in range(rows)], batch_size=4, seed=3)

    alone = make()
    alone.set_epoch(epoch)
    order = list(alone)

    def part(rank: int) -> list[list[int]]:
        filled = Filled(make(), block=4, filler=rows)
        filled.set_epoch(epoch)
        batches = torch.utils.data.BatchSampler(filled, 2, drop_last=False)
        return list(BatchSamplerShard(batches, 2, rank))

    parts = [part(rank) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == -(-rows // 4)
    for step, both in enumerate(zip(*parts, strict=True)):
        taken = [row for half in both for row in half if row != rows]
        assert taken == order[4 * step : 4 * step + 4]


def note(folder: Path, rank: int, kind: str, **more: Any) -> None:
    record = {"rank": rank, "kind": kind, "at": rank, "traceback": f"trace {rank}\n"} | more
    (folder / f"rank-{rank}.json").write_text(json.dumps(record), "utf-8")


def test_the_rank_that_failed_first_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = launch._why
    assert "The processes ended with {0: 3}" in str(why(tmp_path, {0: 3}))
    note(tmp_path, 1, "other", said="RuntimeError: no peer", at=5)
    note(tmp_path, 2, "other", said="ValueError: no", at=4)
    assert "Rank 2 failed: ValueError: no. " in str(why(tmp_path, {1: 1, 2: 1}))
    assert capsys.readouterr().err == "trace 2\n"
    note(tmp_path, 3, "mendable", said="Mend it. So.", at=9)
    assert str(why(tmp_path, {3: 2})) == "Mend it. So."
    said = str(why(tmp_path, {1: -signal.SIGTERM, 0: -signal.SIGKILL}))
    assert said == ("Rank 0 was ended by SIGKILL, and the others with it. "
                    "Look whether memory ran out.")  # fmt: skip


def test_a_signal_is_an_interruption(tmp_path: Path) -> None:
    note(tmp_path, 0, "interrupted", number=15, step=7)
    error = launch._why(tmp_path, {})
    assert isinstance(error, Interrupted) and error.exit_code == 143 and error.step == 7


def test_one_process_is_alone_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") is ALONE and ALONE.gather(3) == [3] and ALONE.backend == "none"
    ALONE.agree({"a": 1}, "")


def test_a_rank_without_a_gpu_says_so() -> None:
    from gemmate_lib.ranks import _take_gpu

    with pytest.raises(GemmateError, match="Rank 5 has no GPU of its own: this machine has 2"):
        _take_gpu(5, 2, 2)


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with launch._agent_tamed():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
