"""Drawing tokens from logits: one op, its definition in whole numbers, and its backends."""

from tw_kernels.sampling.op import Draws, sample_tokens
from tw_kernels.sampling.rows import SamplingRows, uniforms

__all__ = ["Draws", "SamplingRows", "sample_tokens", "uniforms"]
