"""What only a GPU shows of the Triton backend: every candidate configuration, and tuning."""

import pytest
import torch

from tests.kernels.tries import oracle, relative_error, visible, within

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


@pytest.mark.parametrize("window, softcap", [(None, None), (90, 2.0)])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_candidate_gives_the_right_answer(dtype, head_dim, window, softcap):
    from tw_kernels.attention.triton import backward_kernels as bwd
    from tw_kernels.attention.triton import forward_kernel as fwd
    from tw_kernels.attention.triton.tuning import candidates_for
    from tw_kernels.trie import TrieLayout

    n, scale = 700, head_dim**-0.5
    ends = torch.tensor([n] * 150 + [400] * 250 + [n] * 300, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(n, h, head_dim, generator=generator).to("cuda", dtype) for h in (4, 2, 2, 4)
    )
    wide_q, wide_k, wide_v = (x.double().requires_grad_() for x in (q, k, v))
    layout = TrieLayout(ends.cuda())
    mask = within(visible(layout.subtree_ends), window)
    want_out, want_lse = oracle(wide_q, wide_k, wide_v, mask, scale, softcap)
    want_dq, want_dk, want_dv = torch.autograd.grad(
        want_out, (wide_q, wide_k, wide_v), dout.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3 if dtype == torch.bfloat16 else 2e-3

    def check(got, want):
        assert relative_error(got, want.detach()) <= tolerance

    trie = layout.subtree_ends, None if window is None else layout.window_starts(window)
    capability = torch.cuda.get_device_capability()
    candidates = candidates_for(capability, dtype, head_dim, window is not None)
    out = lse = torch.empty(0)
    for config in candidates.forward:
        schedule = layout.block_schedule(config.block_q, config.block_kv, window)
        out, lse = fwd.forward(q, k, v, *trie, schedule, scale, softcap, config)
        check(out, want_out)
        check(lse, want_lse)
    shared = dout, q, k, v, *bwd.row_stats(dout, out, lse), *trie
    for config in candidates.dq:
        schedule = layout.block_schedule(config.block_q, config.block_kv, window)
        check(bwd.grad_q(*shared, schedule, scale, softcap, config), want_dq)
    for config in candidates.dkv:
        schedule = layout.block_schedule(config.block_q, config.block_kv, window)
        dk, dv = bwd.grad_kv(*shared, schedule, scale, softcap, config)
        check(dk, want_dk)
        check(dv, want_dv)


def test_tuning_picks_candidates_once_and_can_be_switched_off(monkeypatch):
    import triton.testing

    from tw_kernels.attention.triton import tuning

    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    variants = [(None, None), (4096, None), (4096, 30.0)]
    capability = torch.cuda.get_device_capability()
    candidates = [
        tuning.candidates_for(capability, q.dtype, 64, any(variant)) for variant in variants
    ]
    monkeypatch.delenv("TW_AUTOTUNE", raising=False)
    chosen = [tuning.configs_for(q, *variant) for variant in variants]
    for configs, all_options in zip(chosen, candidates, strict=True):
        assert all(c in options for c, options in zip(configs, all_options, strict=True))
    monkeypatch.setattr(triton.testing, "do_bench", lambda run: pytest.fail("timed again"))
    assert [tuning.configs_for(q, *variant) for variant in variants] == chosen
    assert tuning.configs_for(q, 512, 5.0) == chosen[2]
    monkeypatch.setenv("TW_AUTOTUNE", "0")
    for variant, all_options in zip(variants, candidates, strict=True):
        assert tuning.configs_for(q, *variant) == tuple(options[0] for options in all_options)
