"""From a timestamp to a feature, as pure functions of tensors.

Shapes: `B` timestamps, int64, in milliseconds since the Unix epoch, UTC.
"""

import torch

from gemmate_lib.config import GemmateError
from gemmate_lib.timestamps import (  # noqa: F401  (the units belong to this interface)
    DAY,
    HOUR,
    MINUTE,
    REFERENCE,
    REFERENCE_MS,
    SECOND,
    YEAR,
    to_timestamp,
)

TAU = 0.1


def require_int64(timestamps: torch.Tensor) -> None:
    """Raise GemmateError for another type than int64.

    float32 has only 24 bits for the number: it rounds a timestamp of our days to a multiple of
    131 seconds before anything is computed.
    """
    if timestamps.dtype != torch.int64:
        raise GemmateError(f"timestamps are {timestamps.dtype}. Pass milliseconds as torch.int64.")


def elapsed_ms(timestamps: torch.Tensor) -> torch.Tensor:
    """Return the milliseconds since the reference, int64 [B]; 1 up to and at the reference.

    Raises: GemmateError for another type than int64.
    """
    require_int64(timestamps)
    # Clamped before the subtraction, which could overflow; both are exact in int64.
    return timestamps.clamp(min=REFERENCE_MS + 1) - REFERENCE_MS


def log_encoding(timestamps: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """Return tau * log(max(t - reference, 1)): float64 [B], at least 0.

    timestamps: int64 [B].
    Raises: GemmateError for another type than int64.
    Reference: the encoding of GemmaTE, relative to 2006-05-23, tau 0.1.
    """
    return elapsed_ms(timestamps).double().log() * tau


def resolution(
    timestamps: torch.Tensor, dtype: torch.dtype = torch.float64, *, tau: float = TAU
) -> torch.Tensor:
    """Return how long the encoding, once held in `dtype`, stays at one value: float64 [B], ms.

    It is the time to the next number of that type: elapsed * (exp(spacing / tau) - 1). Infinite
    before the reference, where every moment has the value 0.
    timestamps: int64 [B].
    Raises: GemmateError for another type than int64.
    """
    value = log_encoding(timestamps, tau)
    _, exponent = torch.frexp(value)  # value = mantissa * 2**exponent, 0.5 <= mantissa < 1
    spacing = torch.ldexp(torch.full_like(value, torch.finfo(dtype).eps), exponent - 1)
    time = elapsed_ms(timestamps) * torch.expm1(spacing / tau)
    return time.masked_fill(timestamps < REFERENCE_MS, torch.inf)
