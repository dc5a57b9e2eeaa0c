"""P-GRPO (docs/semantics.md, "P-GRPO"): roll out, grade, merge each prompt's rollouts into a trie,
update.

The engine decodes on the weights that are trained, in this process; its KV pages are given back
while the weights are updated.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.evaluate.grade import METRICS, Graded, summary
from threadweaver.evaluate.reward import reward
from threadweaver.evaluate.rollouts import check_prompts, fingerprint, roll_out
from threadweaver.generate.engine import Engine
from threadweaver.model import trie_logprobs
from threadweaver.progress import Progress, ResponsesProgress, print_line
from threadweaver.tasks import Problem, load_task
from threadweaver.train.advantages import group_advantages
from threadweaver.train.batches import unrolled_tokens
from threadweaver.train.config import ConfigError
from threadweaver.train.policy_batch import PolicyTrie, micro_batches, policy_group
from threadweaver.train.policy_loss import PolicyLoss, policy_loss
from threadweaver.train.report import print_rl_table
from threadweaver.train.run import Record, Trainer
from threadweaver.train.run_dir import write_json
from threadweaver.train.setup import build_model
from threadweaver.train.stages import RLConfig


class RLTrainer(Trainer[RLConfig]):
    """Reinforcement learning on the problems of a task."""

    def load_data(self) -> None:
        config = self.config
        # The generator runs the whole network, so the trainer must too: no dropout, no noise of any
        # kind (docs/semantics.md, "P-GRPO").
        self.model.eval()
        self.task = load_task(config.task.name, **config.task.options)
        self.problems = self.task.problems("train", config.task.problems, config.seed)
        self.trains_on = f"task: {config.task.name}"
        self.fingerprint = fingerprint(self.problems)
        self.num_steps = config.optimization.steps
        self.engine = Engine(
            self.model,
            self.codec,
            **asdict(config.rollouts.engine),
            autocast=config.compute.precision == "bf16",
        )
        if note := check_prompts(self.engine, self.problems, config.rollouts.generation):
            print_line(self.console, note)
        self.reference = self._load_reference() if config.policy.kl else None

    def train_step(self) -> Record:
        """A batch of problems: rolled out, graded, rewarded, and learnt from."""
        start = time.perf_counter()
        preempted, ungraded = self.engine.preemptions, self.task.ungraded
        problems = list(self._batch_of(self.steps_done))
        graded = self._roll_out(problems)
        self.engine.free()
        rolled_out = time.perf_counter()
        tries, rewards = self._tries_of(graded)
        tokens = sum(g.rollout.num_sampled_tokens for g in graded)
        learnt = self._learn(tries, tokens, [problem.source for problem in problems])
        end = time.perf_counter()
        trie_tokens = sum(map(len, tries))
        unrolled = sum(unrolled_tokens(t.trie) for t in tries)
        self.add_to_totals(
            rollout_tokens=tokens,
            trie_tokens=trie_tokens,
            unrolled_tokens=unrolled,
            rollout_seconds=rolled_out - start,
            update_seconds=end - rolled_out,
            no_signal_groups=rewards["no_signal_groups"],
        )
        return {
            **rewards,
            **learnt,
            **summary(graded),
            "reached_limits": sum(any(asdict(g.rollout.limits).values()) for g in graded),
            "no_answer": sum(g.no_answer for g in graded),
            "ungraded": self.task.ungraded - ungraded,
            "decode_steps": fmean(g.rollout.decode_steps for g in graded),
            "preemptions": self.engine.preemptions - preempted,
            "rollout_tokens": tokens,
            "trie_tokens": trie_tokens,
            "unrolled_tokens": unrolled,
            "rollout_tokens_per_second": tokens / (rolled_out - start),
            "update_tokens_per_second": trie_tokens / (end - rolled_out),
            "tokens_per_second": tokens / (end - start),
        }

    def _batch_of(self, step: int) -> Iterator[Problem]:
        """The problems of a step: pass after pass over all of them, each in an order of its own."""

        def passes() -> Iterator[Problem]:
            first_pass = start // len(self.problems)
            for number in range(first_pass, first_pass + 2 + size // len(self.problems)):
                order = list(self.problems)
                random.Random(f"{self.config.seed}/{number}").shuffle(order)
                yield from order

        size = self.config.rollouts.problems
        start = step * size
        skipped = start % len(self.problems)
        return islice(passes(), skipped, skipped + size)

    def _roll_out(self, problems: Sequence[Problem]) -> list[Graded]:
        """The rollouts of each problem, decoded and graded; those of one problem are neighbours."""
        rollouts = self.config.rollouts
        title, total = f"rolling out, step {self.steps_done + 1}", len(problems) * rollouts.samples
        with ResponsesProgress(self.console, title, total, self.engine) as progress:
            return roll_out(
                self.engine,
                self.task,
                problems,
                rollouts.generation,
                samples=rollouts.samples,
                seed=(self.config.seed, self.steps_done),
                on_progress=progress.decoded,
                on_graded=progress.graded,
            )

    def _tries_of(self, graded: Sequence[Graded]) -> tuple[list[PolicyTrie], Record]:
        """Rewards the rollouts, weighs each against its group, and merges each group into tries.

        Returns:
            The tries of the groups that have a signal, and figures of all groups.
        """
        config, size = self.config, self.config.rollouts.samples
        rewards = [reward(g.correct, g.lengths, config.reward, g.problem.source) for g in graded]
        tries: list[PolicyTrie] = []
        no_signal_groups = dropped_calls = skipped_rollouts = 0
        for first in range(0, len(graded), size):
            group = slice(first, first + size)
            advantages = group_advantages(
                [r.total for r in rewards[group]], config.policy.advantage
            )
            if not any(advantages):
                no_signal_groups += 1
                continue
            merged = policy_group(
                [g.rollout for g in graded[group]], advantages, config.optimization.batch_tokens
            )
            tries += merged.tries
            dropped_calls += merged.dropped_calls
            skipped_rollouts += merged.skipped_rollouts
        return tries, {
            "reward": fmean(r.total for r in rewards),
            "reward_correct": fmean(r.correct for r in rewards),
            "reward_speed": fmean(r.speed for r in rewards),
            "no_signal_groups": no_signal_groups,
            "dropped_calls": dropped_calls,
            "skipped_rollouts": skipped_rollouts,
        }

    def _learn(self, tries: list[PolicyTrie], num_tokens: int, sources: list[str]) -> Record:
        """The optimizer steps of a batch.

        Args:
            num_tokens: of all completions of the batch, those of groups without signal included.
            sources: of its problems.
        """
        settings = self.config.optimization
        warmup = math.ceil(settings.warmup * self.num_steps)
        rate = settings.learning_rate * min(1.0, (self.steps_done + 1) / max(warmup, 1))
        parts = [tries[i :: settings.updates] for i in range(settings.updates)]
        batches = [micro_batches(part, settings.batch_tokens) for part in parts if part]
        old: list[list[Tensor | None]] = [[None] * len(micros) for micros in batches]
        losses: list[PolicyLoss] = []
        norms = []
        passes = sum(map(len, batches)) * (2 if settings.updates > 1 else 1)
        title = f"updating, step {self.steps_done + 1}"
        with Progress(self.console, title, passes, "passes") as progress:
            if settings.updates > 1:
                with torch.no_grad():
                    old = [
                        [self._logprobs(self.model, m) for m in progress.track(micros)]
                        for micros in batches
                    ]
            for micros, old_logprobs in zip(batches, old, strict=True):
                step = [
                    self._backward(micro, before, num_tokens / settings.updates)
                    for micro, before in zip(progress.track(micros), old_logprobs, strict=True)
                ]
                norms.append(
                    self.update(
                        rate,
                        [loss.loss for loss in step],
                        [micro.trie for micro in micros],
                        [sources] * len(micros),
                    )
                )
                losses += step

        def total(name: str) -> float:
            return sum(float(getattr(loss, name)) for loss in losses) / settings.updates

        return {
            **{n: total(n) for n in ("loss", "clip_share", "entropy", "kl", "mismatch")},
            "max_mismatch": max((float(loss.max_mismatch) for loss in losses), default=0.0),
            "gradient_norm": fmean(norms) if norms else 0.0,
            "learning_rate": rate,
            "updates": len(norms),
        }

    def _backward(self, micro: PolicyTrie, old: Tensor | None, num_tokens: float) -> PolicyLoss:
        """Adds the gradient of a micro-batch; its loss."""
        policy = self.config.policy
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self._logprobs(self.reference, micro)
        with self.autocast():
            layout = micro.trie.layout(self.device)
            current = trie_logprobs(
                self.model, micro.trie, layout, micro.sampled, policy.entropy > 0
            )
        loss = policy_loss(current, micro, policy, num_tokens, old, reference)
        loss.loss.backward()
        return PolicyLoss(*(value.detach() for value in loss))

    def _logprobs(self, model: PreTrainedModel, micro: PolicyTrie) -> Tensor:
        with self.autocast():
            layout = micro.trie.layout(self.device)
            return trie_logprobs(model, micro.trie, layout, micro.sampled).logprobs

    def _load_reference(self) -> PreTrainedModel:
        """What the run started from, tags included, so that the first KL is 0."""
        if self.config.model.path is None:
            raise ConfigError(
                "policy.kl: the reference is the model at model.path: set it, or policy.kl 0"
            )
        reference, _ = build_model(self.config, None)
        torch.nn.Module.to(reference, self.device)
        return reference.eval()

    def finish(self) -> None:
        """Writes summary.json and shows what came out."""
        last = self.metrics.last
        totals = self.totals
        trie_tokens = totals["trie_tokens"]
        result = {
            "steps": self.steps_done,
            **{name: last[name] for name in ("reward", *METRICS)},
            "no_signal_groups": int(totals["no_signal_groups"]),
            "rollout_tokens": totals["rollout_tokens"],
            "rollout_tokens_per_second": totals["rollout_tokens"] / totals["rollout_seconds"],
            "trie_tokens": trie_tokens,
            "unrolled_per_trie_token": totals["unrolled_tokens"] / max(trie_tokens, 1),
            "update_tokens_per_second": trie_tokens / totals["update_seconds"],
            "seconds": time.perf_counter() - self.origin,
            "checkpoint": str(self.last_checkpoint),
        }
        write_json(self.run_dir / "summary.json", result)
        print_rl_table(self.console, result, self.run_dir)
