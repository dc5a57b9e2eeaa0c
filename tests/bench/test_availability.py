"""Peers that cannot run here say why."""

import torch
from torch.nn.attention import varlen

from bench import attention_peers, decode_peers
from bench.availability import why_not_importable


def test_a_package_built_for_another_torch_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_flash.py").write_text("raise OSError('undefined symbol: x\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    why = why_not_importable("broken_flash", "f", "broken-flash")
    assert why == "broken-flash cannot be imported: undefined symbol: x"


def test_a_function_of_an_older_torch_says_which_parameter_it_lacks(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch_ = f"of torch {torch.__version__} takes no"
    assert attention_peers._why_no_varlen("cuda") == f"varlen_attn {torch_} window_size"
    assert decode_peers._why_no_varlen("cuda") == f"varlen_attn {torch_} block_table"
    for module in (attention_peers, decode_peers):
        assert module._why_no_varlen("cpu") == "runs on CUDA only"


def test_a_missing_package_is_named():
    assert decode_peers._why_no_cascade("cuda") == "flashinfer-python is not installed"
