"""P-GRPO (docs/semantics.md, "P-GRPO"): roll out, grade, merge each prompt's rollouts into a trie,
update.

The engine decodes on the weights that are trained, in this process; its KV pages are given back
while the weights are updated.

On several ranks each decodes the rollouts of some problems, and keeps them: only what groups earn
and how large they are goes to the others, so that all of them make up the same batch.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver import ranks
from threadweaver.evaluate.grade import METRICS, Graded, summary
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.evaluate.progress import SharedProgress
from threadweaver.evaluate.reward import reward
from threadweaver.evaluate.rollouts import fingerprint, fitting, roll_out, texts_of_problems
from threadweaver.generate.engine import Engine
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.model import TokenLogprobs, trie_logprobs
from threadweaver.model.whole import local
from threadweaver.progress import Progress, print_line
from threadweaver.tasks import Problem, load_task
from threadweaver.train.advantages import group_advantages
from threadweaver.train.batches import unrolled_tokens
from threadweaver.train.config import ConfigError
from threadweaver.train.deal import Cost
from threadweaver.train.groups import Group, batch_of, sample_groups
from threadweaver.train.memory.optimizer import state_bytes
from threadweaver.train.policy_batch import PolicyTrie, policy_group
from threadweaver.train.policy_loss import PolicyLoss, policy_loss
from threadweaver.train.policy_parts import Part, imbalance, parts_of
from threadweaver.train.report import print_rl_table
from threadweaver.train.rollout_model import RolloutModel
from threadweaver.train.run_dir import write_json
from threadweaver.train.setup import build_passes
from threadweaver.train.sharding import Passes
from threadweaver.train.stages import RLConfig
from threadweaver.train.trainer import Record, Trainer


@dataclass
class Merged:
    """What this rank makes of the groups of a batch.

    Attributes:
        tries: of each group; of one that has no signal, or that is elsewhere, none.
        dropped_calls, skipped_rollouts: as in `PolicyGroup`, of all.
    """

    tries: list[list[PolicyTrie]]
    dropped_calls: int = 0
    skipped_rollouts: int = 0


class RLTrainer(Trainer[RLConfig]):
    """Reinforcement learning on the problems of a task."""

    def load(self) -> None:
        task = self.config.task
        self.task = load_task(task.name, **task.options)  # first: it needs no model
        for note in getattr(self.task, "notes", ()):
            print_line(self.console, note)
        super().load()

    def load_data(self) -> None:
        config = self.config
        # The generator runs the whole network, so the trainer must too: no dropout, no noise of any
        # kind (docs/semantics.md, "P-GRPO").
        self.model.eval()
        problems = self.task.problems("train", config.task.problems, config.seed)
        self.report_overlap(texts_of_problems(problems))
        self.trains_on = f"task: {config.task.name}"
        self.fingerprint = fingerprint(problems)
        self.num_steps = config.optimization.steps
        self.rollout_model = RolloutModel(self.model, self.tokenizer, config.compute)
        self.cost = Cost(self.model)
        self.filler = PolicyTrie.filler(self.codec.eos_id)
        # Before the engine, which may take what is left.
        with_second = config.policy.kl and self.lora is None
        self.reference = self._load_reference() if with_second else None
        self.engine = self._engine(config.rollouts.engine)
        if note := self.engine.pool_note:
            print_line(self.console, f"rollouts: {note}")
        self.problems, self.skipped_prompts = self._fitting(
            "training",
            self.engine,
            problems,
            config.rollouts.generation,
            config.optimization.batch_tokens,
        )
        if config.report.validate_every is not None:
            self._load_held_out()

    def _engine(self, sizes: EngineSizes) -> Engine:
        config = self.config
        trained = [p for p in self.model.parameters() if p.requires_grad]
        elements, dtype = [local(p).numel() for p in trained], trained[0].dtype
        moments, _ = state_bytes(config.optimization.optimizer, elements, dtype)
        return Engine(
            self.rollout_model.model,
            self.codec,
            **asdict(sizes),
            autocast=config.compute.precision == "bf16",
            # Moments are there from the second batch on.
            reserve=moments + self.rollout_model.bytes_to_gather,
        )

    def _fitting(
        self,
        kind: str,
        engine: Engine,
        problems: list[Problem],
        settings: GenerationSettings,
        most_tokens: int | None = None,
    ) -> tuple[list[Problem], int]:
        """The problems whose prompts fit, and how many do not, which is shown; as `fitting`."""
        fit, skipped, notes = fitting(engine, problems, settings, most_tokens)
        for note in notes:
            print_line(self.console, f"{kind} problems: {note}")
        return fit, skipped

    def _load_held_out(self) -> None:
        """The problems of validation, and an engine of its sizes. Its KV pages and copied weights
        are there only while it validates, when those of the rollouts are not."""
        config = self.config.evaluate
        self.validator = self._engine(config.engine)
        try:
            problems = self.task.problems("validation", config.problems, self.config.seed)
            self.held_out, _ = self._fitting(
                "held-out", self.validator, problems, config.generation
            )
        except ValueError as error:
            raise ConfigError(f"evaluate: {error}") from error

    def train_step(self) -> Record:
        """A batch of problems: rolled out, graded, rewarded, and learnt from."""
        start = time.perf_counter()
        preempted, ungraded = self.engine.preemptions, self.task.ungraded
        self._decode_seconds = 0.0
        self.rollout_model.gather()
        groups = self._sample()
        self.engine.free()
        self.rollout_model.free()
        rolled_out = time.perf_counter()
        batch = batch_of(groups, self.config.rollouts.problems)
        merged = self._merge(batch)
        optimization = self.config.optimization
        parts = parts_of(
            merged.tries,
            optimization.updates,
            optimization.batch_tokens,
            self.pass_tokens,
        )
        num_tokens = sum(group.num_sampled_tokens for group in batch)
        learnt = self._learn(parts, num_tokens, [group.source for group in batch])
        end = time.perf_counter()
        graded = [g for group in groups for g in group.graded]
        rewards = [r for group in groups for r in group.rewards]
        tokens = sum(group.num_sampled_tokens for group in groups)
        own = [trie for tries in merged.tries for trie in tries]
        trie_tokens, unrolled, dropped_calls, skipped_rollouts, preemptions, ungraded = map(
            int,
            ranks.sums(
                [
                    sum(map(len, own)),
                    sum(unrolled_tokens(t.trie) for t in own),
                    merged.dropped_calls,
                    merged.skipped_rollouts,
                    self.engine.preemptions - preempted,
                    self.task.ungraded - ungraded,
                ]
            ),
        )
        no_signal = sum(not group.has_signal for group in groups)
        sizes = ranks.gather([len(micro) for micros, _ in parts for micro in micros])
        passes = [range(size) for of_rank in sizes for size in of_rank]
        self.add_to_totals(
            rollout_tokens=tokens,
            trie_tokens=trie_tokens,
            unrolled_tokens=unrolled,
            rollout_seconds=rolled_out - start,
            update_seconds=end - rolled_out,
            no_signal_groups=no_signal,
        )
        record: Record = {
            "reward": fmean(r.total for r in rewards),
            "reward_correct": fmean(r.correct for r in rewards),
            "reward_speed": fmean(r.speed for r in rewards),
            "groups": len(groups),
            "no_signal_groups": no_signal,
            "unused_groups": len(groups) - no_signal - sum(group.has_signal for group in batch),
            "dropped_calls": dropped_calls,
            "skipped_rollouts": skipped_rollouts,
            **learnt,
            **self.cost_of(passes, trie_tokens),
            **summary(graded),
            "reached_limits": sum(any(asdict(g.counts.limits).values()) for g in graded),
            "no_answer": sum(g.no_answer for g in graded),
            "ungraded": ungraded,
            "decode_steps": fmean(g.counts.decode_steps for g in graded),
            "preemptions": preemptions,
            "rollout_tokens": tokens,
            "trie_tokens": trie_tokens,
            "unrolled_tokens": unrolled,
            "rollout_tokens_per_second": tokens / (rolled_out - start),
            "update_tokens_per_second": trie_tokens / (end - rolled_out),
            "tokens_per_second": tokens / (end - start),
        }
        if ranks.size() > 1:
            record["imbalance"] = imbalance(parts, self.cost)
            seconds = ranks.gather(self._decode_seconds)
            record["decode_imbalance"] = max(seconds) / max(fmean(seconds), 1e-9)
        every, done = self.config.report.validate_every, self.steps_done + 1
        if every is not None and (done % every == 0 or done == self.num_steps):
            record |= self._validate()
        return record

    def _sample(self) -> list[Group]:
        """The groups of a step, from the next problems on."""
        rollouts = self.config.rollouts
        first = self._groups_sampled
        sampled: list[Group] = []

        def sample(size: int) -> list[Group]:
            problems = list(self._problems_from(first + len(sampled), size))
            groups = self._groups_of(self._roll_out(problems, len(sampled)))
            sampled.extend(groups)
            return groups

        groups = sample_groups(
            sample, rollouts.problems, rollouts.refill_limit if rollouts.refill else 1
        )
        self.totals["groups"] = first + len(groups)
        return groups

    @property
    def _groups_sampled(self) -> int:
        """By all steps done; checkpoints of older versions do not say."""
        before = self.steps_done * self.config.rollouts.problems
        return int(self.totals.get("groups", before))

    def _problems_from(self, start: int, size: int) -> Iterator[Problem]:
        """So many problems, the `start` first ones left out: pass after pass over all of them, each
        in an order of its own."""

        def one_pass(number: int) -> list[Problem]:
            order = list(self.problems)
            random.Random(f"{self.config.seed}/{number}").shuffle(order)
            return order

        number, skipped = divmod(start, len(self.problems))
        passes = map(one_pass, count(number))
        return islice(chain.from_iterable(passes), skipped, skipped + size)

    def _roll_out(self, problems: Sequence[Problem], sampled: int) -> list[Graded]:
        """The rollouts of each problem, decoded and graded; those of one problem are neighbours.

        Args:
            sampled: problems of this step that were rolled out before.
        """
        rollouts = self.config.rollouts
        title, total = f"rolling out, step {self.steps_done + 1}", len(problems) * rollouts.samples
        draws = (self.config.seed, self.steps_done)
        if sampled:
            title, draws = f"{title}, after {sampled} problems", (*draws, sampled)
        with SharedProgress(self.console, title, total, self.engine) as progress:
            graded = roll_out(
                self.engine,
                self.task,
                problems,
                rollouts.generation,
                samples=rollouts.samples,
                seed=draws,
                on_progress=progress.decoded,
                on_graded=progress.graded,
                with_texts=False,
            )
        self._decode_seconds += progress.seconds
        return graded

    def _groups_of(self, graded: Sequence[Graded]) -> list[Group]:
        """Rewards the rollouts and weighs each against its group."""
        config, size = self.config, self.config.rollouts.samples
        groups = []
        for first in range(0, len(graded), size):
            group = graded[first : first + size]
            rewards = [reward(g.correct, g.lengths, config.reward, g.problem.source) for g in group]
            totals = [r.total for r in rewards]
            groups.append(Group(group, rewards, group_advantages(totals, config.policy.advantage)))
        return groups

    def _merge(self, groups: Sequence[Group]) -> Merged:
        """Merges each group that has a signal, and that this rank decoded, into tries."""
        merged = Merged([[] for _ in groups])
        for group, tries in zip(groups, merged.tries, strict=True):
            if group.has_signal and group.is_here:
                made = policy_group(
                    [g.rollout for g in group.graded if g.rollout is not None],
                    group.advantages,
                    self.config.optimization.batch_tokens,
                )
                tries += made.tries
                merged.dropped_calls += made.dropped_calls
                merged.skipped_rollouts += made.skipped_rollouts
        return merged

    def _validate(self) -> Record:
        """Held-out problems in both modes: each time the same, with the same draws."""
        start = time.perf_counter()
        config = self.config
        self.rollout_model.gather()
        evaluations = evaluate_modes(
            ("parallel", "sequential"),
            self.validator,
            self.task,
            self.held_out,
            config.evaluate.generation,
            self.console,
            seed=config.seed,
        )
        self.validator.free()
        self.rollout_model.free()
        record: Record = {}
        for mode, evaluation in evaluations.items():
            figures = summary(evaluation.graded)
            figures |= {"no_answer": evaluation.no_answer, "ungraded": evaluation.ungraded}
            record |= {f"validation_{mode}_{name}": value for name, value in figures.items()}
        record["validation_problems"] = len(self.held_out)
        record["validation_speedup"] = (
            record["validation_sequential_total_tokens"]
            / record["validation_parallel_longest_path_tokens"]
        )
        record["validation_seconds"] = time.perf_counter() - start
        return record

    def _learn(self, parts: Sequence[Part], num_tokens: int, sources: list[str]) -> Record:
        """The optimizer steps of a batch.

        Args:
            num_tokens: of all completions of the batch, those of groups without signal included.
            sources: of its problems.
        """
        settings = self.config.optimization
        warmup = math.ceil(settings.warmup * self.num_steps)
        rate = settings.learning_rate * min(1.0, (self.steps_done + 1) / max(warmup, 1))
        old: list[list[Tensor | None]] = [[None] * len(micros) for micros, _ in parts]
        losses: list[PolicyLoss] = []
        norms = []
        passes = sum(len(micros) + fillers for micros, fillers in parts)
        title = f"updating, step {self.steps_done + 1}"
        with Progress(
            self.console, title, passes * (2 if settings.updates > 1 else 1), "passes"
        ) as progress:
            if settings.updates > 1:
                self.copies.cast()
                with torch.no_grad():
                    for (micros, fillers), logprobs in zip(parts, old, strict=True):
                        logprobs[:] = [
                            self._logprobs(self.passes, m) for m in progress.track(micros)
                        ]
                        for _ in progress.track(range(fillers)):
                            self._logprobs(self.passes, self.filler)
            for (micros, fillers), old_logprobs in zip(parts, old, strict=True):
                self.copies.cast()
                step = [
                    self._backward(micro, before, num_tokens / settings.updates)
                    for micro, before in zip(progress.track(micros), old_logprobs, strict=True)
                ]
                for _ in progress.track(range(fillers)):
                    self._run_filler()
                norms.append(
                    self.update(
                        rate,
                        [loss.loss for loss in step],
                        [micro.trie for micro in micros],
                        [sources] * len(micros),
                    )
                )
                losses += step

        names = ("loss", "clipped", "entropy", "kl", "mismatch")
        sums = [math.fsum(float(getattr(loss, name)) for loss in losses) for name in names]
        # Those of groups with a signal, which alone are looked at.
        tokens = sum(micro.num_completion_tokens for micros, _ in parts for micro in micros)
        loss, *sums, tokens = ranks.sums([*sums, tokens])
        clip_share, entropy, kl, mismatch = (x / max(tokens, 1) for x in sums)
        largest = max((float(loss.max_mismatch) for loss in losses), default=0.0)
        return {
            "loss": loss / settings.updates,
            "clip_share": clip_share,
            "entropy": entropy,
            "kl": kl,
            "mismatch": mismatch,
            "max_mismatch": max(ranks.gather(largest)),
            "gradient_norm": fmean(norms) if norms else 0.0,
            "learning_rate": rate,
            "updates": len(norms),
        }

    def _backward(self, micro: PolicyTrie, old: Tensor | None, num_tokens: float) -> PolicyLoss:
        """Adds the gradient of a micro-batch; its loss."""
        current, reference = self._forward(micro)
        loss = policy_loss(current, micro, self.config.policy, num_tokens, old, reference)
        loss.loss.backward()
        return PolicyLoss(*(value.detach() for value in loss))

    def _run_filler(self) -> None:
        """The passes of `_backward` for nothing, while other ranks have a micro-batch."""
        current, _ = self._forward(self.filler)
        (0 * current.logprobs.sum()).backward()

    def _forward(self, micro: PolicyTrie) -> tuple[TokenLogprobs, Tensor | None]:
        """Log-probabilities with a gradient, and those of the reference if there is one."""
        reference = None
        if self.config.policy.kl:
            with torch.no_grad():
                reference = self._reference_logprobs(micro)
        with self.forward_pass():
            layout, needs_entropy = micro.trie.layout(self.device), self.config.policy.entropy > 0
            current = self.passes(_logprobs, micro.trie, layout, micro.sampled, needs_entropy)
        return current, reference

    def _logprobs(self, passes: Passes, micro: PolicyTrie) -> Tensor:
        with self.autocast():
            layout = micro.trie.layout(self.device)
            return passes(_logprobs, micro.trie, layout, micro.sampled).logprobs

    def _reference_logprobs(self, micro: PolicyTrie) -> Tensor:
        """Of the model that the run started from: without its adapters it is still that."""
        if self.lora is None:
            assert self.reference is not None
            return self._logprobs(self.reference, micro)
        with self.lora.adapters.disabled():
            return self._logprobs(self.passes, micro)

    def _load_reference(self) -> Passes:
        """What the run started from, tags included, so that the first KL is 0."""
        if self.config.model.path is None:
            raise ConfigError(
                "policy.kl: the reference is the model at model.path: set it, or policy.kl 0"
            )
        reference, _ = build_passes(self.config, None, self.device)
        return reference.eval()

    def finish(self) -> None:
        """Writes summary.json and shows what came out."""
        last = self.metrics.last
        totals = self.totals
        trie_tokens = totals["trie_tokens"]
        result = {
            "steps": self.steps_done,
            # A run that began with an older version has not all of them.
            **{name: last[name] for name in ("reward", *METRICS) if name in last},
            **{name: last[name] for name in last if name.startswith("validation_")},
            "skipped_prompts": self.skipped_prompts,
            "groups": self._groups_sampled,
            "no_signal_groups": int(totals["no_signal_groups"]),
            "rollout_tokens": totals["rollout_tokens"],
            "rollout_tokens_per_second": totals["rollout_tokens"] / totals["rollout_seconds"],
            "trie_tokens": trie_tokens,
            "unrolled_per_trie_token": totals["unrolled_tokens"] / max(trie_tokens, 1),
            **self.total_cost,
            "update_tokens_per_second": trie_tokens / totals["update_seconds"],
            "seconds": time.perf_counter() - self.origin,
            "checkpoint": str(self.plain_checkpoint),
        }
        print_rl_table(self.console, result, self.run_dir)
        ranks.on_first(lambda: write_json(self.run_dir / "summary.json", result | self.overlap))


def _logprobs(model: PreTrainedModel, *args: Any) -> TokenLogprobs:
    """`trie_logprobs` as tensors of their own: FSDP warns of views."""
    return TokenLogprobs(*(values.clone() for values in trie_logprobs(model, *args)))
