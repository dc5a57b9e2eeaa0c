"""What a CUDA graph cannot hold: calls that wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitsForDevice(RuntimeError):  # noqa: N818 (named for what was found)
    """A call that reads on the host what the device computes."""


@contextmanager
def without_waits() -> Iterator[None]:
    """For the last call before its capture: what would wait for the device is an error.

    Found by the capture itself it would be one that PyTorch does not come back from: stream,
    allocator and generators of random numbers would be left as they are while capturing. The mode
    is one of the process, so no other thread may wait meanwhile.

    Raises:
        WaitsForDevice: in place of the first wait; before it all ran as ever.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that there are waits which it does not see
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise WaitsForDevice(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
