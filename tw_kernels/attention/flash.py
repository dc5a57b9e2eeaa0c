"""ATen's flash attention with its log-sum-exp, on CPU and CUDA, and its backward.

The one extra over F.scaled_dot_product_attention is that backward may be given the log-sum-exp and
output of a *larger* softmax than the piece it runs on: the gradients are then that piece's exact
share of the whole (docs/architecture.md, fact 4).

Shapes: q [B, Hq, M, D], k and v [B, Hkv, L, D], any strides; lse [B, Hq, M]. `bias` is additive,
[B, 1, M, L], CPU only.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten

# On a CPU, ATen's half-precision backward prepares every small matrix product anew: below this many
# pairs a head, float32 is faster (16 x 16: 0.05 ms against 0.5; 256 x 256: 2.0 against 2.9;
# 512 x 512: even; two Xeon cores with AMX, 9 heads of 64).
FEW_PAIRS = 2**18


def why_not(q: Tensor) -> str | None:
    """None if ATen's flash attention takes q's device, dtype and head dim, else the reason."""
    if q.device.type == "cpu":
        if q.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"ATen's flash attention takes no {q.dtype}"
    elif q.device.type == "cuda":
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"ATen's flash attention on CUDA takes bfloat16 and float16, not {q.dtype}"
        if q.shape[-1] % 8:
            return f"ATen's flash attention on CUDA takes head dims in eights, not {q.shape[-1]}"
    else:
        return f"ATen has no flash attention on {q.device.type}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, M, D] and lse [B, Hq, M]."""
    if q.is_cuda:
        k, v = _repeat_heads(q, k), _repeat_heads(q, v)
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the shapes of q, k, v."""
    if q.is_cuda:
        heads = k.shape[1]
        k, v = _repeat_heads(q, k), _repeat_heads(q, v)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # no dropout, so no seed
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *(dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2]),
            *(0.0, causal, unused, unused),
            scale=scale,
        )
        return dq, _sum_groups(dk, heads), _sum_groups(dv, heads)
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16) and q.shape[2] * k.shape[2] < FEW_PAIRS:
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
        bias = None if bias is None else bias.float()
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    dq, dk, dv = (grad.to(dtype) for grad in grads)
    return dq, dk, dv


def _repeat_heads(q: Tensor, k: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _sum_groups(grad: Tensor, heads: int) -> Tensor:
    return grad.unflatten(1, (heads, -1)).sum(2)
