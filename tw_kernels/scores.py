"""What a call of either op may do to its scores, and in which ranges."""

from __future__ import annotations

from numbers import Integral, Real
from typing import NamedTuple

from torch import Tensor

# What a scale and a soft cap can be, so that neither they nor their quotient leave float32.
NUMBERS = 1e-18, 1e18
# No path or sequence is longer, so no window need be.
LONGEST = 2**31


class ScoreOptions(NamedTuple):
    """None where a call has none; see `trie_attention` and `trie_decode`."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq]


NO_OPTIONS = ScoreOptions()


def check_number(name: str, value: float) -> float:
    """Raises ValueError, with `name`, unless it is a number in NUMBERS."""
    least, most = NUMBERS
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}")
    return float(value)


def check_options(
    q: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> ScoreOptions:
    """The options of a call with q [N, Hq, D]; a window that nothing can exceed is None.

    Raises:
        ValueError: a window that is no integer of at least 1, a soft cap out of range, or sinks
            that are not floating-point numbers [Hq] where q is.
    """
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, Integral) or window < 1:
            raise ValueError(f"window must be an integer of at least 1, or None; got {window!r}")
        window = int(window) if window < LONGEST else None
    if softcap is not None:
        softcap = check_number("softcap", softcap)
    if sinks is not None:
        _check_sinks(sinks, q)
    return ScoreOptions(window, softcap, sinks)


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if not isinstance(sinks, Tensor):
        raise ValueError(f"sinks must be a tensor or None, got {type(sinks).__name__}")
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks must be floating-point numbers [Hq], here [{q.shape[1]}], on {q.device}; "
            f"got {sinks.dtype} {list(sinks.shape)} on {sinks.device}"
        )
