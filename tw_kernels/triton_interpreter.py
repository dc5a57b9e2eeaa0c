"""Triton's interpreter: whether kernels run in it, and the repairs that it needs.

As of Triton 3.6 the interpreter keeps bfloat16 numbers as their bits, multiplies those bits as
integers in a dot, and truncates float32 to bfloat16 where a GPU rounds to nearest even. It also
turns a loop bound, an array of one element, into an int in a way that NumPy 2.4 refuses (triton
issue 9171). Importing this module repairs all three, if the interpreter is on.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def is_on() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported."""
    return isinstance(tl.max, interpreter.InterpretedFunction)


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _repair() -> None:
    builder: Any = interpreter.InterpreterBuilder
    convert, dot, patch = (
        interpreter._convert_float,
        builder.create_dot,
        interpreter._patch_lang_tensor,
    )

    def convert_float(x, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return _widen(x)
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            return _narrow(x)
        return convert(x, from_dtype, to_dtype, rounding_mode)

    def create_dot(self, a, b, *rest):
        if a.dtype == b.dtype == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_widen(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_tensor
    builder.create_dot = create_dot


if is_on():
    _repair()
