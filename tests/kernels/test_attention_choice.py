"""Which backend of trie_attention runs on which GPU, by compute capabilities that are pretended."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tw_kernels import TrieLayout
from tw_kernels.attention import cuda
from tw_kernels.attention.op import choose_backend


@pytest.fixture
def gpu_of(monkeypatch):
    """Pretends a GPU of a compute capability, with Triton and the CUDA kernels built."""
    cubin = SimpleNamespace(exists=lambda: True)
    monkeypatch.setattr(cuda, "FORWARD_CUBIN", cubin)
    monkeypatch.setattr(cuda, "BACKWARD_CUBIN", cubin)
    monkeypatch.setattr("tw_kernels.cuda_device._C.cuda_driver_missing", lambda: "")
    monkeypatch.setattr("tw_kernels.triton_device._is_installed", lambda: True)

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def choice_on_a_gpu(dtype: torch.dtype, head_dim: int, **variant: Any) -> str:
    q: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(9, 4, head_dim))
    layout = TrieLayout(torch.full((9,), 9, dtype=torch.int32))
    return choose_backend(q, q, q, layout, **variant)


def test_hopper_takes_cuda_in_half_precision_at_head_dims_64_and_128_and_triton_for_the_rest(
    gpu_of,
):
    gpu_of((9, 0))
    for head_dim in (64, 128):
        assert choice_on_a_gpu(torch.bfloat16, head_dim) == "cuda"
        assert choice_on_a_gpu(torch.float16, head_dim) == "cuda"
        assert choice_on_a_gpu(torch.float32, head_dim) == "triton"
        assert choice_on_a_gpu(torch.bfloat16, head_dim, window=5) == "triton"
        assert choice_on_a_gpu(torch.bfloat16, head_dim, softcap=2.0) == "triton"
        assert choice_on_a_gpu(torch.bfloat16, head_dim, name="triton") == "triton"
    assert choice_on_a_gpu(torch.bfloat16, 32) == "triton"
    assert choice_on_a_gpu(torch.bfloat16, 256) == "triton"
    assert choice_on_a_gpu(torch.bfloat16, 96) == "segments"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_take_triton(gpu_of, capability):
    gpu_of(capability)
    assert choice_on_a_gpu(torch.bfloat16, 128) == "triton"
    with pytest.raises(ValueError, match=rf"capability 9.0, not {capability[0]}\.{capability[1]}"):
        choice_on_a_gpu(torch.bfloat16, 128, name="cuda")


def test_hopper_without_built_kernels_takes_triton(gpu_of, monkeypatch):
    gpu_of((9, 0))
    monkeypatch.setattr(cuda, "BACKWARD_CUBIN", SimpleNamespace(exists=lambda: False))
    assert choice_on_a_gpu(torch.bfloat16, 128) == "triton"
    with pytest.raises(ValueError, match="not built: TW_CUDA=1 python"):
        choice_on_a_gpu(torch.bfloat16, 128, name="cuda")
