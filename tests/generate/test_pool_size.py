"""How many KV pages an engine has."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollouts import CODEC

from threadweaver import device
from threadweaver.generate import engine as engine_module
from threadweaver.generate.engine import Engine
from threadweaver.generate.pool_size import PageNeeds, PoolSize, pool_size
from threadweaver.generate.settings import EngineSizes, GenerationSettings

GB = 10**9
NEEDS = PageNeeds(page_bytes=10**6, page_size=16, most_pages=50_000, set_aside=2 * GB)


@pytest.mark.parametrize(
    ("kind", "memory", "unused", "pages", "reason"),
    [
        # 50 GB are left, less 2 for a step and 5 % of 80.
        ("cuda", 80 * GB, 50 * GB, 44_000, "what 80 GB have left"),
        ("cuda", 80 * GB, 79 * GB, 50_000, "all that max_sequences can fill"),
        ("cuda", 80 * GB, 5 * GB, 0, "what 80 GB have left"),
        ("cpu", 64 * GB, 64 * GB, 16_000, "25% of 64 GB"),
        ("cpu", 1000 * GB, 1000 * GB, 50_000, "all that max_sequences can fill"),
    ],
)
def test_auto_is_what_a_device_has_left_and_no_more_than_sequences_can_fill(
    kind, memory, unused, pages, reason
):
    size = NEEDS.auto(kind, memory, unused)
    assert (size.pages, size.reason) == (pages, reason)
    assert size.tokens == 16 * pages and size.bytes == 10**6 * pages


def test_a_line_says_how_many_tokens_fit(fork_join_model):
    engine = Engine(fork_join_model, CODEC)
    tokens = f"{engine.pool.num_pages * 16:,} tokens"
    assert engine.pool_note is not None and tokens in engine.pool_note
    assert Engine(fork_join_model, CODEC, kv_gigabytes=0.01).pool_note is None


def test_a_pool_of_a_size_holds_that_many_bytes_of_keys_and_values(fork_join_model):
    """In bfloat16 twice the tokens of float32."""
    sizes = EngineSizes(kv_gigabytes=0.01)
    whole, half = (pool_size(fork_join_model, sizes, autocast) for autocast in (False, True))
    assert half.pages // 2 == pytest.approx(whole.pages, abs=1)
    for size in (whole, half):
        assert 0.01e9 - size.page_bytes < size.bytes <= 0.01e9
    engine = Engine(fork_join_model, CODEC, kv_gigabytes=0.01, autocast=True)
    assert engine.pool.num_pages == half.pages


def test_a_pool_shrinks_with_what_is_left_when_a_batch_begins(fork_join_model, monkeypatch):
    engine, settings = Engine(fork_join_model, CODEC), GenerationSettings(max_tokens=40)
    prompt = [1, 2, 3]
    before = engine.pool.num_pages
    engine.add(prompt, settings, seed=1)
    (expected,) = engine.run()

    def left(pages):
        size = PoolSize(pages, 1, 16, "auto")
        monkeypatch.setattr(engine_module, "pool_size", lambda *a: size)

    left(before + 5)  # pages that are there stay, and none come back
    engine.free()
    engine.add(prompt, settings, seed=1)
    engine.run()
    assert engine.pool.num_pages == before
    left(3)
    engine.free()
    engine.add(prompt, settings, seed=1)
    (found,) = engine.run()
    assert (
        engine.pool.num_pages == 3 == engine._runner.num_pages == engine._scheduler.pool.num_pages
    )
    assert found.response == expected.response
    left(2)
    engine.free()
    engine.add(prompt, settings, seed=1)
    for _ in range(2):  # as long as there is no more room
        with pytest.raises(MemoryError, match=r"2 KV pages of 16 .* 43 tokens: lower max_"):
            engine.run()
    left(3)
    (found,) = engine.run()
    assert found.response == expected.response


def test_a_device_that_has_no_room_for_a_page_any_more_is_out_of_memory(
    fork_join_model, monkeypatch
):
    engine = Engine(fork_join_model, CODEC)
    monkeypatch.setattr("threadweaver.generate.pool_size.memory_of", lambda device: 1000)
    engine.add([1, 2, 3], GenerationSettings(max_tokens=40))
    with pytest.raises(MemoryError, match="a page of 16 tokens"):
        engine.run()


def test_pages_that_are_held_are_not_taken_from_under_a_batch(fork_join_model, monkeypatch):
    engine, settings = Engine(fork_join_model, CODEC), GenerationSettings(max_tokens=40)
    before = engine.pool.num_pages
    for _ in range(2):
        engine.add([1, 2, 3], settings)
        engine.run()
        monkeypatch.setattr(engine_module, "pool_size", lambda *a: PoolSize(3, 1, 16, "auto"))
    assert engine.pool.num_pages == before


def test_a_device_without_room_for_a_page_is_refused(fork_join_model, monkeypatch):
    monkeypatch.setattr("threadweaver.generate.pool_size.memory_of", lambda device: 1000)
    with pytest.raises(ValueError, match=r"kv_gigabytes is auto, and 25% of 1e-06 GB: .* a page"):
        Engine(fork_join_model, CODEC)


def test_a_gpu_that_a_step_fills_is_refused_by_what_the_step_follows_from(monkeypatch):
    needs = replace(NEEDS, set_aside=21 * GB)
    monkeypatch.setattr(PageNeeds, "of", lambda *a: needs)
    monkeypatch.setattr("threadweaver.generate.pool_size.memory_of", lambda device: 24 * GB)
    monkeypatch.setattr("threadweaver.generate.pool_size.unused_memory", lambda device: 22 * GB)
    model: Any = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="0 GB after 21 GB that a step takes") as error:
        pool_size(model, EngineSizes(), autocast=True)
    assert "lower max_sequences or max_batch_tokens" in str(error.value)


def test_memory_in_pieces_is_no_room_for_pages(monkeypatch):
    """Nor is what PyTorch keeps and could give back: it gives it back before anything is sized."""
    free = [20 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 5 * GB))
    assert device.unused_memory(torch.device("cuda")) == 25 * GB


def test_pages_go_back_to_the_device_before_anyone_else_can_lie_in_them(
    fork_join_model, monkeypatch
):
    engine = Engine(fork_join_model, CODEC, kv_gigabytes=0.01)
    engine.add([1, 2, 3], GenerationSettings(max_tokens=8))
    engine.run()
    pages, there = weakref.ref(engine._runner._pages), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(pages() is not None))
    engine.free()
    assert there == [False]


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"memory.max": "max\n"}, []),
        ({"a/b/memory.max": "max\n", "a/memory.max": "5000\n"}, [5000]),
        ({"memory/c/memory.limit_in_bytes": "7000\n"}, [7000]),
        # A container that sees its own group as the mount.
        ({"memory.max": "4000\n", "memory/memory.limit_in_bytes": "3000\n"}, [3000, 4000]),
    ],
)
def test_a_control_group_limits_the_memory_of_a_host(tmp_path, files, limits):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/c\n1:name=systemd:/\n0::/a/b\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sorted(device._group_limits(tmp_path)) == limits


def test_a_pool_leaves_room_for_copies_of_weights_and_for_what_is_reserved(
    fork_join_model, monkeypatch
):
    left = []

    def found(model, sizes, autocast, reserve=0):
        left.append(reserve)
        return pool_size(model, sizes, autocast, reserve)

    monkeypatch.setattr(engine_module, "pool_size", found)
    engine = Engine(fork_join_model, CODEC, autocast=True, reserve=1000)
    engine._runner.cast()
    copies = sum(own.nbytes for own, _ in engine._runner._weights._copies)
    assert copies > 0 and left == [1000 + copies] and engine._runner.bytes_to_copy == 0
    engine.free()
    assert engine._runner.bytes_to_copy == copies
