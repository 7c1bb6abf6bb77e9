"""What a process and its machine's GPUs use at this moment, by psutil and NVML."""

import contextlib
from typing import Any


class Usage:
    """Reads the use of processor, memory and GPUs; without a GPU it reads the others alone."""

    def __init__(self) -> None:
        import psutil

        self._process, self._memory = psutil.Process(), psutil.virtual_memory
        self._process.cpu_percent()  # the first answer is always 0: here it begins to count
        self._gpus = _handles()

    def read(self) -> dict[str, float]:
        """cpu_percent (100: one core, since the last call), rss_mib, available_mib; for each GPU
        gpu0_percent, gpu0_used_mib, gpu0_total_mib, and so on.
        """
        found = {
            "cpu_percent": self._process.cpu_percent(),
            "rss_mib": self._process.memory_info().rss / 2**20,
            "available_mib": self._memory().available / 2**20,
        }
        for number, handle in enumerate(self._gpus):
            found |= {f"gpu{number}_{name}": value for name, value in _of_gpu(handle).items()}
        return found


def _handles() -> list[Any]:
    """NVML's handles of the GPUs that torch sees here: it may see fewer, in another order."""
    import torch

    if not torch.cuda.is_available():
        return []
    import pynvml

    found = []
    with contextlib.suppress(pynvml.NVMLError):  # a driver without NVML, as on some Jetsons
        pynvml.nvmlInit()
        for number in range(torch.cuda.device_count()):
            uuid = f"GPU-{torch.cuda.get_device_properties(number).uuid}"
            found.append(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    return found


def _of_gpu(handle: Any) -> dict[str, float]:
    import pynvml

    found: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):  # a slice of a GPU (MIG) tells no utilisation
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        found = {"used_mib": memory.used / 2**20, "total_mib": memory.total / 2**20}
        found["percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return found
