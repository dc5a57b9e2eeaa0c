"""Whole rollouts, ours against `transformers`: `python -m bench.rollout --help`.

Every row says the same recorded tokens: a script takes the place of what is drawn, after logits,
draws and log-probabilities are computed as ever. So it does not matter what the model would say.

    ours, parallel          threads at the same time
    ours, sequential        one token after another, tags and all
    transformers generate   likewise, on the same weights: padded batches of at most 64, in the
                            order of the requests, each done with its longest response; greedy and
                            without log-probabilities, as it costs least
    transformers continuous batching
                            as many tokens, of its own choice: nothing can be put in their place.
                            At most 64 requests at once; the server's start is not timed

    fork-join-N       N requests: a prompt of 64 tokens, four threads of 64, some text around them
    multiplication    problems of threadweaver.tasks, or the rows of --replay FILE
    mixed-256         256 requests, prompts of 8 to 64 tokens and responses of 8 to 256, through 64
                      slots of the model of configs/sft-demo.yaml, untrained

    tok/s         tokens of the responses, forced ones included, over the time
    steps         forward passes; ms/step: time for one, whatever it holds
    latency x     tokens of the responses / tokens on their longest paths
    x seq         how many times faster than ours, sequential; of latency: as a share of latency x
    x generate, x cont.   how many times faster than transformers
    time %        model without attention / attention / plan / orchestration / sampling
    mean, max Δ   |Δ log p| of the sampled tokens against the trie trainer's forward pass, over
                  the first few requests
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

from bench.environment import HOUSE
from bench.frame import Options, Peer, Row, Setup, Skip, Suite, UsageError, main
from threadweaver.data import DataError, load_examples
from threadweaver.device import DTYPES, Precision, resolve
from threadweaver.generate import Rollout
from threadweaver.generate.engine import Engine, Script
from threadweaver.generate.replay import script_of
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Mode
from threadweaver.model import (
    ATTENTION,
    add_tags,
    build_tokenizer,
    load_model,
    new_model,
    trie_logprobs,
)
from threadweaver.tasks.multiplication import question, trajectory
from threadweaver.trajectory import Codec, path_lengths
from tw_kernels import Trie

PARALLEL, SEQUENTIAL = "ours, parallel", "ours, sequential"
GENERATE = "transformers generate"
CONTINUOUS = "transformers continuous batching"
PAGE_SIZE = 16
MOST_BATCHED = 64
# Of continuous batching: tokens of a page, as FlashAttention-2 takes it, and of a step.
BLOCK_SIZE, STEP_TOKENS = 256, 1024
# How far below the best a token may be that was said to be the best, in units of the logits'
# standard deviation: what rounding makes of equals.
GREEDY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Requests whose log-probabilities are compared with the trainer's.
COMPARED = 4
WORDS = (
    "the a of to and in that it is was for on with as at by we they from this one two all each so "
    "then but when where river stone light water morning house garden number part sum table paper "
    "walk carry open find count write turn hold small large old new first last quiet long over"
)


@dataclass
class RolloutOptions(Options):
    """Options of bench.rollout, beside those of every benchmark.

    Args:
        model: of all cases but mixed: smollm2, a Hugging Face folder, or tiny, the model of
            configs/sft-demo.yaml, untrained. Default: smollm2, with --quick tiny.
        dtype: of weights, keys and values; auto: bf16 where the device multiplies it, else fp32.
        replay: recorded trajectories in the place of multiplication; columns as in training data.
        rows: how many of them, from the first.
        batch: requests of the larger fork-join case. Default: 64, on a CPU 8.
    """

    model: str | None = None
    dtype: Precision = "auto"
    replay: Path | None = None
    rows: int = 8
    batch: int | None = None


class Trajectory(NamedTuple):
    """Ids; the response ends with the end token. `source`: where it was recorded."""

    prompt: list[int]
    response: list[int]
    source: str = ""


class Language:
    """A model with its tokenizer's codec, loaded when first asked for.

    Raises:
        UsageError: on loading: there is no such model.
    """

    def __init__(self, name: str, dtype: str, device: str):
        self.name, self.dtype, self._device = name, dtype, device

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Codec]:
        if self.name == "tiny":
            settings = yaml.safe_load((HOUSE / "configs" / "sft-demo.yaml").read_text())
            tokenizer = build_tokenizer()
            model = new_model(tokenizer, settings["model"]["arch"])
        else:
            try:
                model, tokenizer = load_model(self.name, DTYPES[self.dtype])
            except ValueError as error:
                raise UsageError(f"--model: {error}") from error
            add_tags(tokenizer, model)
        torch.nn.Module.to(model, self._device, DTYPES[self.dtype])
        return model.eval(), Codec.from_tokenizer(tokenizer)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def codec(self) -> Codec:
        return self._loaded[1]

    def text(self, rng: random.Random, n: int) -> list[int]:
        """Ids of n tokens of words in no order; n >= 1."""
        return self.codec.encode(" ".join(rng.choices(WORDS.split(), k=n)))[:n]


@dataclass(frozen=True)
class Case:
    """Requests that are there from the start; `slots`: most threads that a step advances."""

    name: str
    requests: int
    slots: int
    build: Callable[[Language], list[Trajectory]] = field(repr=False)


class Said(NamedTuple):
    """What a peer did: its responses, in how many forward passes; our record of them."""

    responses: list[list[int]]
    steps: int
    rollouts: list[Rollout]


class RolloutSetup(Setup):
    """A case on a model."""

    def __init__(self, case: Case, language: Language):
        self.case, self.language = case, language
        self.servers = ExitStack()
        self.engines: dict[str, Engine] = {}
        self.measured: dict[str, Row] = {}  # what does not depend on the time, by peer

    @property
    def key(self) -> Row:
        return {
            "case": self.case.name,
            "requests": self.case.requests,
            "slots": self.case.slots,
            "model": self.language.name,
            "dtype": self.language.dtype,
        }

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        return self.case.build(self.language)

    @cached_property
    def total_tokens(self) -> int:
        return sum(len(t.response) for t in self.trajectories)

    @cached_property
    def latency_speedup(self) -> float:
        lengths = [path_lengths(t.response, self.language.codec) for t in self.trajectories]
        return self.total_tokens / sum(x.longest_path_tokens for x in lengths)

    def scripts(self, mode: Mode) -> list[tuple[Trajectory, GenerationSettings, Script]]:
        """How an engine comes to each trajectory.

        Raises:
            UsageError: it cannot; names the source.
        """
        out = []
        for t in self.trajectories:
            ids, room = t.prompt + t.response, self.language.model.config.max_position_embeddings
            if len(ids) > room:
                raise UsageError(f"{t.source}: {len(ids)} tokens, over the model's context, {room}")
            settings = GenerationSettings(mode, max_tokens=len(t.response))
            try:
                script = script_of(ids, len(t.prompt), self.language.codec, settings)
            except ValueError as error:
                raise UsageError(f"{t.source}: {error}") from error
            out.append((t, settings, script))
        return out

    def check(self, peer: str, result: Said, inputs: int) -> str | None:
        for i, (said, t) in enumerate(zip(result.responses, self.trajectories, strict=True)):
            if len(said) != len(t.response) or (peer != CONTINUOUS and said != t.response):
                return f"request {i} did not get its recorded response"
        if peer == CONTINUOUS:
            for i, said in enumerate(result.responses[:COMPARED]):
                if (below := self._below_best(self.trajectories[i].prompt, said)) > (
                    most := GREEDY_TOLERANCE[self.language.model.dtype]
                ):
                    return f"request {i} got a token {below:.1e} below the best, over {most:.0e}"
        self.measured[peer] = {"steps": result.steps}
        if result.rollouts:
            delta = mismatch(self.language.model, result.rollouts[:COMPARED])
            mean, most = delta.mean().item(), delta.max().item()
            self.measured[peer] |= {"mean_mismatch": mean, "max_mismatch": most}
        return None

    @torch.no_grad()
    def _below_best(self, prompt: list[int], said: list[int]) -> float:
        """By how much the worst of the tokens misses the best there was, as GREEDY_TOLERANCE has
        it."""
        model: Any = self.language.model
        model.set_attn_implementation("sdpa")
        ids = torch.tensor([prompt + said], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return ((logits.max(1).values - chosen) / logits.std(1)).max().item()

    def close(self) -> None:
        self.servers.close()

    def figures(self, peer: str, seconds: float) -> Row:
        row = {
            "tokens": self.total_tokens,
            "tokens_per_second": self.total_tokens / seconds,
            "latency_speedup": self.latency_speedup,
            **self.measured[peer],
        }
        row["ms_per_step"] = 1e3 * seconds / row["steps"]
        if peer in self.engines:
            shares = time_shares(self.engines[peer])
            row |= {f"{part}_share": share for part, share in shares.items()}
            row["shares"] = "/".join(f"{100 * share:.0f}" for share in shares.values())
        return row


def mismatch(model: PreTrainedModel, rollouts: list[Rollout]) -> Tensor:
    """|Δ log p| between engine and trie trainer of every sampled token, float32 [n]."""
    completions = [c for rollout in rollouts for c in rollout.completions if c.tokens]
    trie = Trie.from_paths([c.context + c.tokens for c in completions])
    at = [trie.path_nodes(i)[len(c.context) :] for i, c in enumerate(completions)]
    with torch.no_grad():
        expected = trie_logprobs(model, trie, trie.layout(model.device), torch.cat(at)).logprobs
    sampled = torch.tensor([p for c in completions for p in c.logprobs], device=expected.device)
    return (sampled - expected).abs()


def time_shares(engine: Engine) -> dict[str, float]:
    """Where the time of all its steps went; the shares add up to 1."""
    seconds = dict(engine.seconds)
    seconds["model"] -= seconds["attention"]
    total = sum(seconds.values())
    parts = ("model", "attention", "plan", "orchestration", "sampling")
    return {part: seconds[part] / total for part in parts}


def _ours(peer: str, mode: Mode) -> Callable[[RolloutSetup], Callable[[int], Said]]:
    def prepare(setup: RolloutSetup) -> Callable[[int], Said]:
        if mode == "parallel" and setup.latency_speedup == 1:
            raise Skip("no request forks")
        language, scripts = setup.language, setup.scripts(mode)
        # Joined text is there twice: on its own thread's path, and on the line that goes on.
        tokens = sum(len(t.prompt) + 2 * len(t.response) for t, _, _ in scripts)
        completions = sum(len(script) for _, _, script in scripts)
        engine = setup.engines[peer] = Engine(
            language.model,
            language.codec,
            page_size=PAGE_SIZE,
            num_pages=tokens // PAGE_SIZE + 2 * completions,
            max_sequences=setup.case.slots,
        )

        def call(_: int) -> Said:
            language.model.set_attn_implementation(ATTENTION)
            steps = []
            for t, settings, script in scripts:
                engine.add(t.prompt, settings, script=script)
            rollouts = engine.run(steps.append)
            return Said([r.response for r in rollouts], len(steps), rollouts)

        return call

    return prepare


class Recorded:
    """A logits processor that makes greedy decoding say recorded tokens.

    Args:
        tokens: [rows, longest response].
        width: of the prompts.
    """

    def __init__(self, tokens: Tensor, width: int):
        self._tokens, self._width = tokens, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self._width
        return scores.scatter_(1, self._tokens[:, at : at + 1], torch.inf)


def _generate(setup: RolloutSetup) -> Callable[[int], Said]:
    model: Any = setup.language.model  # `generate` is declared on a mixin, as a module
    eos, device = setup.language.codec.eos_id, model.device

    def batch(part: list[Trajectory]) -> Callable[[], list[list[int]]]:
        width = max(len(t.prompt) for t in part)
        longest = max(len(t.response) for t in part)
        ids = torch.tensor([[eos] * (width - len(t.prompt)) + t.prompt for t in part])
        mask = torch.tensor([[0] * (width - len(t.prompt)) + [1] * len(t.prompt) for t in part])
        tokens = torch.tensor([t.response + [eos] * (longest - len(t.response)) for t in part])
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        processors = LogitsProcessorList([Recorded(tokens.to(device), width)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=longest, eos_token_id=eos, pad_token_id=eos
        )

        def run() -> list[list[int]]:
            out = model.generate(**inputs, generation_config=config, logits_processor=processors)
            rows = out[:, width:].tolist()
            return [row[: row.index(eos) + 1] for row in rows]

        return run

    all_ = setup.trajectories
    parts = [all_[i : i + MOST_BATCHED] for i in range(0, len(all_), MOST_BATCHED)]
    batches = [batch(part) for part in parts]
    steps = sum(max(len(t.response) for t in part) for part in parts)

    def call(_: int) -> Said:
        model.set_attn_implementation("sdpa")
        return Said([response for run in batches for response in run()], steps, [])

    return call


def _why_not_continuous(device: str) -> str | None:
    if hasattr(transformers, "ContinuousBatchingConfig"):
        return None
    return f"transformers {transformers.__version__} has no ContinuousBatchingConfig"


def _continuous(setup: RolloutSetup) -> Callable[[int], Said]:
    model: Any = setup.language.model
    trajectories = setup.trajectories
    longest = max(len(t.prompt) + len(t.response) for t in trajectories)
    at_once = min(MOST_BATCHED, len(trajectories))
    model.set_attn_implementation("sdpa")  # what it starts from; it takes its own paged form
    manager = model.init_continuous_batching(
        GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=setup.language.codec.eos_id
        ),
        transformers.ContinuousBatchingConfig(
            block_size=BLOCK_SIZE,
            num_blocks=at_once * -(-longest // BLOCK_SIZE),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=at_once,
            allow_block_sharing=False,  # or a call would find the prompts of the one before
        ),
    )
    attention = model.config._attn_implementation
    manager.start()
    setup.servers.callback(manager.stop)

    def call(_: int) -> Said:
        model.set_attn_implementation(attention)
        before = getattr(manager, "current_batch", 0)  # its thread sets it as it starts
        ids = [manager.add_request(t.prompt, max_new_tokens=len(t.response)) for t in trajectories]
        said = {}
        while len(said) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread ended")
            if result is not None and result.is_finished():
                said[result.request_id] = result.generated_tokens
        return Said([said[id_] for id_ in ids], manager.current_batch - before, [])

    return call


def fork_join(requests: int, threads: int = 4, length: int = 64) -> Case:
    """A block of equal threads; a thread's header is not in its length, its </Thread> is."""

    def build(language: Language) -> list[Trajectory]:
        codec, rng = language.codec, random.Random(requests)

        def one() -> Trajectory:
            numbers = range(1, threads + 1)
            outlines = "".join(f"<Outline>{n}: part {n}</Outline>\n" for n in numbers)
            response = language.text(rng, 16)
            response += codec.encode(f"<Parallel>\n<Outlines>\n{outlines}</Outlines>")
            response += codec.newline_ids
            for n in numbers:
                response += codec.encode(f"<Thread>\n{n}:") + language.text(rng, length - 1)
                response.append(codec.tag_ids["</Thread>"])
            response += [*codec.newline_ids, codec.tag_ids["</Parallel>"]]
            response += language.text(rng, 16)
            return Trajectory(language.text(rng, 64), [*response, codec.eos_id])

        return [one() for _ in range(requests)]

    return Case(f"fork-join-{requests}", requests, requests * threads, build)


def multiplication(requests: int, digits: tuple[int, int] = (3, 3)) -> Case:
    """Products of two factors, a thread for each digit of the second."""

    def build(language: Language) -> list[Trajectory]:
        codec, rng = language.codec, random.Random(requests)

        def one() -> Trajectory:
            factors = [rng.randrange(10 ** (n - 1), 10**n) for n in digits]
            response = codec.encode(trajectory(factors, parallel=True))
            return Trajectory(codec.encode(question(factors)), [*response, codec.eos_id])

        return [one() for _ in range(requests)]

    return Case("multiplication", requests, requests * digits[1], build)


def replayed(path: Path, rows: int) -> Case:
    try:
        examples = load_examples(path)[:rows]
    except DataError as error:
        raise UsageError(f"--replay: {error}") from error

    def build(language: Language) -> list[Trajectory]:
        codec = language.codec
        return [
            Trajectory(
                codec.encode(example.prompt),
                [*codec.encode(example.response), codec.eos_id],
                f"--replay: {example.source}",
            )
            for example in examples
        ]

    threads = max(example.response.count("</Thread>") for example in examples)
    return Case(path.name, len(examples), len(examples) * max(1, threads), build)


def mixed(requests: int, slots: int, longest: int) -> Case:
    def build(language: Language) -> list[Trajectory]:
        rng = random.Random(requests)
        return [
            Trajectory(
                language.text(rng, rng.randint(8, 64)),
                [*language.text(rng, rng.randint(8, longest) - 1), language.codec.eos_id],
            )
            for _ in range(requests)
        ]

    return Case(f"mixed-{requests}", requests, slots, build)


def setups(options: RolloutOptions) -> Iterator[RolloutSetup]:
    for name in ("rows", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}: it must be at least 1")
    name = options.model or ("tiny" if options.quick else "smollm2")
    precision = resolve(options.dtype, torch.device(options.device))
    language = Language(name, precision, options.device)
    tiny = language if name == "tiny" else Language("tiny", precision, options.device)
    if options.model:
        _ = language.model  # one that is not there ends the run before it begins
    if options.replay:
        recorded = RolloutSetup(replayed(options.replay, options.rows), language)
        recorded.scripts("parallel")  # a row that cannot be replayed ends the run before it begins
    elif options.quick:
        recorded = RolloutSetup(multiplication(1, digits=(1, 2)), language)
    else:
        recorded = RolloutSetup(multiplication(options.rows), language)
    if options.quick:
        yield RolloutSetup(fork_join(options.batch or 1, threads=2, length=16), language)
        yield recorded
        yield RolloutSetup(mixed(8, 4, 32), tiny)
        return
    yield RolloutSetup(fork_join(1), language)
    yield RolloutSetup(fork_join(options.batch or (8 if options.device == "cpu" else 64)), language)
    yield recorded
    yield RolloutSetup(mixed(256, 64, 256), tiny)


def relate(rows: dict[str, Row]) -> None:
    if PARALLEL in rows and SEQUENTIAL in rows:
        row = rows[PARALLEL]
        row["of_latency"] = row["ratios"][SEQUENTIAL] / row["latency_speedup"]


SUITE = Suite(
    name="rollout",
    options=RolloutOptions,
    setups=setups,
    peers=[
        Peer(PARALLEL, _ours(PARALLEL, "parallel"), ours=True),
        Peer(SEQUENTIAL, _ours(SEQUENTIAL, "sequential"), ours=True),
        Peer(GENERATE, _generate),
        Peer(CONTINUOUS, _continuous, why_absent=_why_not_continuous),
    ],
    columns={
        "tokens_per_second": "tok/s",
        "steps": "steps",
        "ms_per_step": "ms/step",
        "latency_speedup": "latency x",
        "of_latency": "of latency",
        "shares": "time %",
        "mean_mismatch": "mean Δ",
        "max_mismatch": "max Δ",
    },
    versus={SEQUENTIAL: "x seq", GENERATE: "x generate", CONTINUOUS: "x cont."},
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
