"""What both ops may do to scores, checked once for both: scale, soft cap, window and sinks."""

from __future__ import annotations

from numbers import Integral, Real

from torch import Tensor

# What a scale and a soft cap can be, so that neither they nor their quotient leave float32.
NUMBERS = 1e-18, 1e18
# No path or sequence is longer, so no window need be.
LONGEST = 2**31


def check_number(name: str, value: float) -> float:
    """Raises ValueError, with `name`, unless it is a number in NUMBERS."""
    least, most = NUMBERS
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}")
    return float(value)


def check_window(window: int | None) -> int | None:
    """None if nothing can be longer than the window.

    Raises:
        ValueError: it is no integer of at least 1.
    """
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, Integral) or window < 1:
        raise ValueError(f"window must be an integer of at least 1, or None; got {window!r}")
    return int(window) if window < LONGEST else None


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Raises ValueError unless they are floating-point numbers [Hq] where q [N, Hq, D] is."""
    if not isinstance(sinks, Tensor):
        raise ValueError(f"sinks must be a tensor or None, got {type(sinks).__name__}")
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks must be floating-point numbers [Hq], here [{q.shape[1]}], on {q.device}; "
            f"got {sinks.dtype} {list(sinks.shape)} on {sinks.device}"
        )
