"""The machine: its facts, and a quiet, seeded, deterministic start on it."""

import logging
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from gemmate_lib.config import Facts

# Read by the libraries when they are imported; your own setting wins.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # it warns, and may hang, when a worker is forked
}


def read_facts() -> Facts:
    """What this machine can do; of several GPUs the first counts."""
    quiet()  # a notebook's first call, before anything heavy is imported
    import psutil
    import torch

    ram = psutil.virtual_memory().total / 2**30
    if torch.cuda.is_available():
        gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        return Facts("cuda", (gpu.major, gpu.minor), gpu.total_memory / 2**30, ram, count)
    return Facts("mps" if torch.backends.mps.is_available() else "cpu", ram_gib=ram)


def describe() -> dict[str, Any]:
    """What decides the last bits of a result, for the manifest."""
    import torch

    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _known(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def quiet() -> None:
    """No telemetry, progress bars or chatter; warnings stay, but for those known as harmless."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # bitsandbytes 0.50.2, backends/cpu/ops.py: asks for the optional `kernels`, at import and only
    # on CPUs with AVX512-BF16. Delete this once the message is gone from there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_known)
    # tqdm misses ipywidgets in a notebook: progress bars are off, and widgets are not wanted.
    warnings.filterwarnings("ignore", "IProgress not found")
    # torch 2.13 imports its own torch/utils/mkldnn.py, which still uses torch.jit.
    warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
    # peft 0.21.2 and trl 1.16 use the name from before transformers 5.23.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is depr", FutureWarning)
    # What is imported already has read its environment.
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_DISABLE_TELEMETRY"] = True
    if bars := sys.modules.get("huggingface_hub.utils.tqdm"):
        bars.disable_progress_bars()
    for name in ("datasets.utils.logging", "transformers.utils.logging"):
        if module := sys.modules.get(name):
            module.set_verbosity_error()
            module.disable_progress_bar()


def _keep_memory() -> None:
    """Let glibc keep freed blocks of up to 64 MiB, the size of a step's temporaries.

    By default it hands them back to the kernel at once and gets them again, page by page: about a
    fifth of a small training step. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 64 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 512 * 2**20)  # M_TRIM_THRESHOLD


def speak(level: str) -> None:
    """Print the library's own messages from this level on, to stderr."""
    log = logging.getLogger("gemmate")
    log.setLevel(level)
    if log.level < logging.WARNING and not log.hasHandlers():  # warnings are printed without one
        log.addHandler(logging.StreamHandler())


def transformers_level(level: str) -> str:
    """What the Trainer logs at: its chatter only where INFO or DEBUG is asked for."""
    return level.lower() if level in ("DEBUG", "INFO") else "error"


def prepare(*, seed: int, threads: int | None = None, deterministic: bool = True) -> None:
    """Quiet, threads, seeds and algorithms; call it before anything is computed.

    deterministic: ask for algorithms that give the same bits each time.
    The variable GEMMATE_THREADS outranks `threads`, so that one can see what hangs on them.
    """
    quiet()
    _keep_memory()
    threads = int(os.environ.get("GEMMATE_THREADS") or threads or 0) or None
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    import torch
    from transformers import set_seed

    if threads is not None:
        torch.set_num_threads(threads)
    set_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Otherwise each torch.empty is filled with NaN, to show who reads what was never written; of
    # TRL 1.16's buffer of 32,768 columns that is a third of a tiny model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False


def peak_memory_mib() -> float:
    """The most memory held so far, in MiB: on the GPU if there is one, else by the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def runs_home() -> Path:
    """Where runs are kept: GEMMATE_RUNS, else `runs` in the checkout, else in this directory."""
    if home := os.environ.get("GEMMATE_RUNS"):
        return Path(home).expanduser()
    checkout = Path(__file__).parents[1]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "runs"
