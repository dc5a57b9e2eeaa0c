"""The engine on pages that hold token labels: what a kernel would read is checked at every step.

The generations go through random scripts, so every shape of fork and join comes up, in pools from
just large enough for one path to larger than all.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import CODEC, RandomModel, ids, randoms, unhurried, weaver_settings
from simulated_pages import SimulatedPages
from transformers import Qwen3Config, Qwen3ForCausalLM

from threadweaver.generate import Engine, GenerationSettings, Weaver
from threadweaver.generate.scheduler import Batch, common_prefix_length
from tw_kernels.sampling import Draws, SamplingRows
from tw_kernels.sampling.rows import Column

MODEL = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=128,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=10_000,
    )
)


class LabelRunner:
    """Stands in for Runner: pages hold token ids, and every path is read back through its table."""

    def __init__(self, num_pages: int, page_size: int, overlaps: bool = False):
        self.pages = SimulatedPages(num_pages, page_size)
        self.page_size = page_size
        self.seconds = {"plan": 0.0, "model": 0.0, "attention": 0.0, "sampling": 0.0}
        self.overlaps = overlaps
        self.unread: list[Any] = []  # launched steps
        self.computed = 0
        self.largest_batch = 0

    def cast(self) -> None:
        pass

    def plan(
        self, batch: Batch, sequences: list[Any], rows: SamplingRows, constraints: Any
    ) -> SimpleNamespace:
        tokens = rows.data[:, Column.FORCED]
        return SimpleNamespace(batch=batch, sequences=sequences, tokens=tokens, drawn=None)

    def launch(self, step: Any, after: Any = None) -> None:
        batch, drawn = step.batch, {}
        if after is not None:
            assert self.unread == [after]
            drawn = dict(zip(after.sequences, after.tokens.tolist(), strict=True))
        self.unread.append(step)
        step.drawn = step.tokens
        writes, written = [], {}
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            table = sequence.table
            for page in table.pages[(table.length - count) // self.page_size :]:
                assert written.setdefault(page, sequence) is sequence, "two owners write one page"
            path = sequence.ids + ([drawn[sequence]] if after else [])
            writes.append((table, path[table.length - count : table.length]))
        self.pages.run(batch.copies, writes)
        for sequence in batch.sequences:
            path = sequence.ids + ([drawn[sequence]] if after else [])
            assert self.pages.read(sequence.table) == path[: sequence.table.length]
        self.computed += sum(batch.counts)
        self.largest_batch = max(self.largest_batch, sum(batch.counts))

    def read(self, step: Any) -> Draws:
        assert self.unread.pop(0) is step
        zeros = torch.zeros(len(step.tokens))
        return Draws(step.tokens, zeros, zeros)


def label_engine(
    num_pages: int, page_size: int, overlaps: bool = False, **sizes: Any
) -> tuple[Engine, LabelRunner]:
    runner = LabelRunner(num_pages, page_size, overlaps)
    with mock.patch("threadweaver.generate.engine.Runner", return_value=runner):
        engine = Engine(MODEL, CODEC, page_size=page_size, num_pages=num_pages, **sizes)
    return engine, runner


def scripted(prompt: list[int], settings: GenerationSettings, random) -> tuple[dict, Weaver]:
    """A random script for a prompt, and the Weaver that went through it by itself."""
    weaver = settings.weaver(prompt, CODEC, 10_000)
    model = RandomModel(random)
    while not weaver.done:
        request = random.choice(weaver.requests())
        weaver.complete(request, *model(request))
    return {id: completion.tokens for id, completion in model.completions.items()}, weaver


@unhurried
@given(
    randoms,
    weaver_settings(),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 8),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([3, 40, 4096]),
    st.sampled_from([1.0, 1.3, 3.0]),
    st.booleans(),
)
def test_every_generation_ends_as_its_script_says_however_small_the_pool(
    random, limits, page_size, count, max_sequences, max_batch_tokens, room, overlaps
):
    prompts = [ids("1ab\n" * random.randint(1, 6)) for _ in range(2)]
    settings = GenerationSettings(**limits)
    jobs = [(prompt, *scripted(prompt, settings, random)) for prompt in prompts * count]
    longest = max(map(len, prompts)) + limits["max_tokens"]
    num_pages = int(-(-longest // page_size) * room)
    engine, runner = label_engine(
        num_pages,
        page_size,
        overlaps,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
    )
    for prompt, script, _ in jobs:
        engine.add(prompt, settings, script=script)
    rollouts = engine.run()
    assert [r.response for r in rollouts] == [weaver.response for _, _, weaver in jobs]
    assert [r.limits for r in rollouts] == [weaver.limits for _, _, weaver in jobs]
    assert engine.pool.free_pages == num_pages
    assert not engine.has_work and not engine._families and not runner.unread
    assert runner.largest_batch <= max(max_batch_tokens, max_sequences)


def test_a_prompt_is_prefilled_once_for_all_its_generations():
    prompt = ids("1ab\n" * 50)
    engine, runner = label_engine(1000, 16)
    for _ in range(8):
        engine.add(prompt, GenerationSettings(), script={(0,): ids("ab<eos>")})
    rollouts = engine.run()
    # The last prompt token of each and its three tokens, of which the last is never fed.
    assert runner.computed == len(prompt) - 1 + 8 * (1 + 2)
    assert [r.num_sampled_tokens for r in rollouts] == [3] * 8


def test_a_prompt_is_prefilled_once_for_generations_that_have_to_wait_for_a_place():
    prompt = ids("1ab\n" * 50)
    engine, runner = label_engine(1000, 16, max_sequences=1)
    for _ in range(8):
        engine.add(prompt, GenerationSettings(), script={(0,): ids("ab<eos>")})
    engine.run()
    assert runner.computed == len(prompt) - 1 + 8 * (1 + 2)
    assert engine.pool.free_pages == 1000


def test_a_join_computes_threads_2_to_n_again_and_nothing_else():
    outlines = "".join(f"<Outline>{n}:</Outline>" for n in (1, 2, 3))
    script = {
        (0,): f"a<Parallel><Outlines>{outlines}</Outlines>",
        (0, 0, 0): "ab1ab</Thread>",
        (0, 1, 0): "a</Thread>",
        (0, 2, 0): "</Thread>",
        (1,): "</Parallel><eos>",
    }
    script = {id: ids(text) for id, text in script.items()}
    engine, runner = label_engine(100, 4)
    prompt = ids("1ab\n")
    engine.add(prompt, GenerationSettings(max_tokens=200), script=script)
    engine.run()
    header, joined = (
        len(ids("\n<Thread>\n1:")),
        len(ids("<Thread>\n2:a</Thread><Thread>\n3:</Thread>\n")),
    )
    threads = [len(script[0, t, 0]) for t in range(3)]
    expected = (
        len(prompt)
        + len(script[0,]) - 1
        + sum(1 + header + n - 1 for n in threads)  # </Outlines>, the header, its own but the last
        + 1 + joined  # </Thread> of thread 1
        + len(script[1,]) - 1
    )  # fmt: skip
    assert runner.computed == expected


def test_more_threads_than_the_pool_holds_take_turns():
    outlines = "".join(f"<Outline>{n}:</Outline>" for n in range(1, 9))
    script = {(0,): ids(f"<Parallel><Outlines>{outlines}</Outlines>")}
    script |= {(0, t, 0): ids("ab" * 20 + "</Thread>") for t in range(8)}
    script[1,] = ids("</Parallel><eos>")
    settings = GenerationSettings(max_tokens=500)
    prompt = ids("1ab\n")
    engine, _ = label_engine(-(-(len(prompt) + 500) // 4), 4)
    # A neighbour of lower rank keeps the pool full.
    for _ in range(2):
        engine.add(prompt, settings, script=script)
    first, second = engine.run()
    assert first.response == second.response
    assert engine.preemptions > 0


def test_a_pool_too_small_for_one_path_is_refused():
    engine, _ = label_engine(10, 16)
    with pytest.raises(ValueError, match="need 11 KV pages of 16 tokens, and the pool has 10"):
        engine.add(ids("1ab\n"), GenerationSettings(max_tokens=157))
    engine.add(ids("1ab\n"), GenerationSettings(max_tokens=156))


def test_a_prompt_that_fills_the_context_is_refused():
    engine, _ = label_engine(10_000, 16)
    prompt = ids("ab" * 5000)
    with pytest.raises(ValueError, match="prompt has 10000 tokens, and the model's context ends"):
        engine.add(prompt, GenerationSettings())
    engine.add(prompt[1:], GenerationSettings(max_tokens=50), script={(0,): ids("a")})
    (rollout,) = engine.run()
    assert rollout.response == ids("a") and rollout.limits.response == 1


def test_the_memory_of_pages_is_not_freed_under_a_live_generation():
    engine, _ = label_engine(100, 16)
    engine.add(ids("1ab\n"), GenerationSettings(max_tokens=20), script={(0,): ids("ab")})
    engine.step()
    with pytest.raises(RuntimeError, match="1 generations are not finished"):
        engine.free()


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix_length(a, b):
    n = common_prefix_length(a, b)
    assert (a[:n] == b[:n] and a[: n + 1] != b[: n + 1]) or n == min(len(a), len(b))
