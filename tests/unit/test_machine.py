"""Facts, silence, seeds: and that silence swallows nothing else."""

import importlib.util
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from gemmate_lib import machine
from gemmate_lib.config import Facts

OPS = logging.getLogger("bitsandbytes.backends.cpu.ops")
KERNELS = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure"


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    environ, threads = dict(os.environ), torch.get_num_threads()
    state = torch.random.get_rng_state()
    yield
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(threads)
    torch.random.set_rng_state(state)
    torch.use_deterministic_algorithms(False)
    OPS.removeFilter(machine._known)


def source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent.joinpath(file).read_text(encoding="utf-8")


def test_facts_of_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = machine.read_facts()
    assert facts.capability is None and facts.gpu_count == 0 and facts.gpu_memory_gib is None
    assert 0.5 < facts.ram_gib < 1e5


def test_facts_of_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(major=7, minor=5, total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    facts = machine.read_facts()
    assert facts == Facts("cuda", (7, 5), 15.0, facts.ram_gib, 2)


def test_the_description_holds_what_decides_the_last_bits() -> None:
    torch.set_num_threads(1)
    described = machine.describe()
    assert described["threads"] == 1
    assert described["capability"] == torch.backends.cpu.get_cpu_capability()
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert str(Path.home()) not in str(described)


def test_the_same_seed_gives_the_same_numbers() -> None:
    import numpy as np

    def draw(seed: int) -> tuple[float, float, float]:
        machine.prepare(seed=seed)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_threads_are_set_only_if_asked() -> None:
    torch.set_num_threads(2)
    machine.prepare(seed=0)
    assert torch.get_num_threads() == 2
    machine.prepare(seed=0, threads=1)
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    assert torch.are_deterministic_algorithms_enabled()


def test_quiet_before_the_imports_reaches_the_libraries() -> None:
    code = (
        "from gemmate_lib import machine; machine.quiet()\n"
        "from huggingface_hub import constants, utils\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, utils.are_progress_bars_disabled())"
    )
    ours = {*machine._QUIET, "DISABLE_TELEMETRY", "DO_NOT_TRACK"}
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_quiet_after_the_imports_reaches_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import transformers
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    # As if they had been imported before any other test was quiet.
    for module, name in (("huggingface_hub", "HF_HUB"), ("datasets", "HF_DATASETS")):
        bars = sys.modules[f"{module}.utils.tqdm"]
        monkeypatch.setattr(bars, f"{name}_DISABLE_PROGRESS_BARS", None)
    levels = [library.utils.logging.get_verbosity() for library in (datasets, transformers)]
    for library in (datasets, transformers):
        library.utils.logging.set_verbosity_warning()
        library.utils.logging.enable_progress_bar()
    machine.quiet()
    assert constants.HF_HUB_DISABLE_TELEMETRY
    for library, level in zip((datasets, transformers), levels, strict=True):
        assert library.utils.logging.get_verbosity() == logging.ERROR
        assert not library.utils.logging.is_progress_bar_enabled()
        library.utils.logging.set_verbosity(level)


def test_your_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    machine.quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_only_the_warning_about_kernels_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    OPS.warning(KERNELS, "no module")
    assert len(caplog.records) == 1
    machine.quiet()
    machine.quiet()
    OPS.warning(KERNELS, "no module")
    OPS.warning("Something else is wrong")
    assert [record.message for record in caplog.records[1:]] == ["Something else is wrong"]
    assert OPS.filters == [machine._known]


@pytest.mark.parametrize(
    ("message", "category"),
    [
        ("`torch.jit.script_method` is deprecated. Please switch", DeprecationWarning),
        ("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning),
        ("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning),
    ],
)
def test_only_the_known_warnings_are_silenced(message: str, category: type[Warning]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(category):
            warnings.warn(message, category, stacklevel=1)
        machine.quiet()
        warnings.warn(message, category, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("Merge lora module to 4-bit linear may get different", stacklevel=1)
        with pytest.raises(category):
            warnings.warn("Something else is deprecated", category, stacklevel=1)


@pytest.mark.parametrize(
    ("package", "file", "text"),
    [
        ("bitsandbytes", "backends/cpu/ops.py", KERNELS),
        ("bitsandbytes", "backends/cpu/ops.py", "logger = logging.getLogger(__name__)"),
        ("peft", "peft_model.py", '"is_gradient_checkpointing"'),
        ("trl", "trainer/base_config.py", "gradient_checkpointing: bool"),
        ("torch", "utils/mkldnn.py", "torch.jit.script_method"),
    ],
)
def test_upstream_still_needs_silencing(package: str, file: str, text: str) -> None:
    assert text in source(package, file), "Fixed upstream: delete its line from quiet()."


def test_the_peak_is_in_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    now = psutil.Process().memory_info().rss / 2**20
    assert 0.99 * now < machine.peak_memory_mib() < 100 * now  # a wrong unit is off by 1,024
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert machine.peak_memory_mib() == 3.0


def test_runs_live_in_the_checkout_or_here_or_where_you_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GEMMATE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "checkout" / "gemmate_lib" / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(module))
    assert machine.runs_home() == tmp_path / "runs"
    module.parent.mkdir(parents=True)
    (module.parents[1] / "pyproject.toml").touch()
    assert machine.runs_home() == tmp_path / "checkout" / "runs"
    monkeypatch.setenv("GEMMATE_RUNS", str(tmp_path / "mine"))
    assert machine.runs_home() == tmp_path / "mine"
