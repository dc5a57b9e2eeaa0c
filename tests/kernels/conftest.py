"""With no GPU, Triton kernels run in Triton's interpreter: to be said before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
