"""P-GRPO (docs/semantics.md, "P-GRPO"): roll out, grade, merge each prompt's rollouts into a trie,
update.

The engine decodes on the weights that are trained, in this process; its KV pages are given back
while the weights are updated.

On several ranks each decodes the rollouts of some problems, and keeps them: only what groups earn
and how large they are goes to the others, so that all of them make up the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from statistics import fmean

from threadweaver import ranks
from threadweaver.evaluate.grade import METRICS, Graded, summary
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.evaluate.progress import SharedProgress
from threadweaver.evaluate.reward import reward
from threadweaver.evaluate.rollouts import fingerprint, fitting, roll_out, texts_of_problems
from threadweaver.generate.engine import Engine
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.progress import print_line
from threadweaver.tasks import Problem, load_task
from threadweaver.train.advantages import group_advantages
from threadweaver.train.batches import unrolled_tokens
from threadweaver.train.config import ConfigError
from threadweaver.train.deal import Cost
from threadweaver.train.groups import Group, batch_of, sample_groups
from threadweaver.train.memory.optimizer import state_bytes
from threadweaver.train.merged import merge
from threadweaver.train.policy_parts import imbalance, parts_of
from threadweaver.train.policy_update import PolicyTrainer
from threadweaver.train.problem_order import in_passes
from threadweaver.train.report import print_rl_table
from threadweaver.train.rollout_model import RolloutModel
from threadweaver.train.run_dir import write_json
from threadweaver.train.trainer import Record


class RLTrainer(PolicyTrainer):
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
        self.load_reference()  # before the engine, which may take what is left
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
        moments, _ = state_bytes(
            config.optimization.optimizer,
            [tuple(p.shape) for p in trained],
            trained[0].dtype,
            ranks.size() if self.is_sharded else 1,
        )
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
        optimization = self.config.optimization
        merged = merge(batch, optimization.batch_tokens)
        parts = parts_of(
            merged.tries, optimization.updates, optimization.batch_tokens, self.pass_tokens
        )
        num_tokens = sum(group.num_sampled_tokens for group in batch)
        learnt = self.learn(parts, num_tokens)
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
            **self.cost_of(list(chain(*sizes)), trie_tokens),
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
            start = first + len(sampled)
            problems = in_passes(self.problems, self.config.seed, start, size)
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
                with_rollouts=True,
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
