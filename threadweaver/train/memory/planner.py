"""Plans of runs: the phases that a run has, and the bytes of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import torch

from threadweaver.train.config import AdamWConfig, ComputeConfig, RunConfig
from threadweaver.train.memory.blueprint import architecture_of
from threadweaver.train.memory.optimizer import state_bytes, step_bytes
from threadweaver.train.memory.phases import RollingOut, Updating, phases_of
from threadweaver.train.memory.plan import Part, Phase, Plan
from threadweaver.train.memory.rollout import EngineUse, count_engine
from threadweaver.train.memory.sharding import sharded
from threadweaver.train.memory.target import Target, target_of
from threadweaver.train.memory.update import Passes, UpdateBytes, count_activations, count_update
from threadweaver.train.same_on_ranks import check_divisible

# Of passes that are chosen. A path is never cut, so passes are to hold long ones: a plan takes none
# that would be more than so many parts of a batch.
LEAST_TOKENS = 1024
_FEWEST_PARTS = 8
_STEP = 256


class Planner:
    """Plans of runs of one model, each of whose parts is counted once.

    Raises:
        ConfigError: there is no such model, or it cannot be trained on tries.
    """

    def __init__(self, config: RunConfig):
        self.architecture = architecture_of(config.model)
        self._counted = cache(partial(count_update, self.architecture))
        self._forward = cache(partial(count_activations, self.architecture))
        self._engine = cache(partial(count_engine, self.architecture))

    def plan(self, config: RunConfig) -> Plan:
        """Raises ConfigError for settings that cannot be."""
        target = target_of(config.compute)
        check_divisible(config, target.ranks)
        return Plan(target, tuple(self._phases(config, target)))

    def _phases(self, config: RunConfig, target: Target) -> Iterator[Phase]:
        for phase in phases_of(config):
            if isinstance(phase, Updating):
                yield self._updating(phase, config.compute, target)
            else:
                yield self._rolling_out(phase, target)

    def _updating(self, phase: Updating, compute: ComputeConfig, target: Target) -> Phase:
        """With passes of compute.pass_tokens, or as a GPU would choose them."""
        most = phase.optimization.batch_tokens
        if compute.pass_tokens is not None:
            tokens, note = min(compute.pass_tokens, most), "compute.pass_tokens"
        else:
            tokens, note = self.fitting_tokens(phase, compute, target), "chosen so that it fits"
            if tokens is None or tokens * _FEWEST_PARTS < most:
                tokens = most
        if tokens == most:
            title = f"{phase.title}: update on {most:,} tokens at a time"
        else:
            title = f"{phase.title}: update on {most:,} tokens in passes of {tokens:,} ({note})"
        return self._update(title, phase, tokens, compute, target, explain=True)

    def fitting_tokens(self, phase: Updating, compute: ComputeConfig, target: Target) -> int | None:
        """The most tokens of a pass with which an update fits, at most those of a batch; None:
        even the fewest do not. What is held grows with the tokens as a line, but for pieces.

        On a CPU, where nothing is chosen, those of a batch.
        """
        most = phase.optimization.batch_tokens

        def total(tokens: int) -> int:
            return self._update("", phase, tokens, compute, target, explain=False).total

        of_most = total(most)
        if not target.on_gpu or of_most <= target.usable or most <= LEAST_TOKENS:
            return most
        fewest, of_fewest = LEAST_TOKENS, total(LEAST_TOKENS)
        if of_fewest > target.usable:
            return None
        while True:
            share = (target.usable - of_fewest) / (of_most - of_fewest)
            tokens = fewest + int(share * (most - fewest)) // _STEP * _STEP
            if tokens == fewest or (of_tokens := total(tokens)) <= target.usable:
                return tokens
            most, of_most = tokens, of_tokens

    def _update(
        self,
        title: str,
        phase: Updating,
        tokens: int,
        compute: ComputeConfig,
        target: Target,
        explain: bool,
    ) -> Phase:
        """`explain`: with what activations would take recomputed and not."""
        optimization, policy = phase.optimization, phase.policy
        recomputed, trained = compute.gradient_checkpointing, self._trained_dtype(target)
        micro_batches = phase.micro_batches
        several = micro_batches is None or micro_batches > target.ranks
        passes = Passes(
            tokens,
            recomputed,
            target.parameters if target.ranks == 1 else target.products,
            target.autocast,
            target.on_gpu,
            policy is not None,
            policy is not None and policy.entropy > 0,
            several or tokens < optimization.batch_tokens,
            target.ranks > 1,
            compute.activation_offload,
            compute.compile,
        )
        found = self._counted(passes)
        kept = ""
        if explain:
            without, with_all = (
                found.activations if recomputed is every else self._activations(passes, every)
                for every in (False, True)
            )
            kept = f"{_gb(without)} without recomputation, {_gb(with_all)} with"
        held = [*self._state(optimization, target), *self._reference(phase, target)]
        dtype = _name(target.parameters)
        if target.ranks == 1:
            peak, shares = found.peak, found.parameters + found.gradients
            parts = [
                Part("parameters", found.parameters, dtype),
                Part(f"copies in {_name(target.products)}", found.copies),
                Part("gradients", found.gradients, _name(trained)),
            ]
        else:
            has_adapters = self.architecture.lora is not None
            of_ranks = f"a share of {target.ranks}"
            share = sharded(found, target, has_adapters, passes.sums_gradients)
            peak, shares = share.peak, share.parameters + share.gradients
            parts = [
                Part("parameters", share.parameters, f"{dtype}, {of_ranks}"),
                Part("gathered parameters", share.gathered, _name(target.products)),
                Part("gradients", share.gradients, "" if has_adapters else of_ranks),
                Part("gradients to sum", share.summed),
            ]
        parts += [
            *held,
            Part("activations", found.activations, kept),
            Part("output layer's pieces", found.output_pieces),
        ]
        of_state = optimization.optimizer, found.shapes, trained, self._sharing(target)
        step = step_bytes(*of_state)
        total = max(peak, shares + step) + sum(part.bytes for part in held)
        _, host = state_bytes(*of_state)
        return Phase(title, _there(parts), total, host + found.host, tokens=tokens)

    def _rolling_out(self, phase: RollingOut, target: Target) -> Phase:
        sizes, trained = phase.settings.engine, phase.weights == "trained"
        # Of several ranks each gathers the weights in the dtype of products.
        own = trained and target.ranks == 1
        dtype = target.parameters if own else target.products
        copied = own and target.autocast
        # The size of the pool decides nothing of what else there is.
        use = EngineUse(replace(sizes, kv_gigabytes="auto"), dtype, copied, target.on_gpu, own)
        found = self._engine(use)
        held = [*self._state(phase.beside, target), *self._reference(phase, target)]
        if trained and target.ranks > 1:
            share = self._parameters(target)
            held.append(Part("trained parameters", share, f"a share of {target.ranks}"))
        elif phase.keeps_trained and not (target.on_gpu and target.ranks == 1):
            held.append(Part("trained parameters", self._parameters(target), "until the end"))
        parts = [
            Part("parameters", found.parameters, _name(dtype)),
            *held,
            Part("rollout copy", found.copies, _name(target.products)),
            Part("a step", found.step, f"of {sizes.max_batch_tokens:,} tokens"),
        ]
        name = f"{phase.section}.engine.kv_gigabytes"
        taken = sum(part.bytes for part in parts)
        if sizes.kv_gigabytes == "auto":
            unused = target.memory - (taken - found.step)
            pool = found.pages.auto(target.device, target.memory, unused)
            # A pool that cannot hold a response is none.
            context = found.pages.most_pages // sizes.max_sequences
            longest = min(context, -(-phase.settings.generation.max_tokens // sizes.page_size))
            pool = replace(pool, pages=max(pool.pages, longest))
            note = f"{name} auto, {pool.reason}"
        else:
            pool, note = found.pages.named(sizes.kv_gigabytes), f"{name} {sizes.kv_gigabytes:g}"
        parts.insert(-1, Part("KV pages", pool.bytes, f"{pool.tokens:,} tokens, {note}"))
        return Phase(
            phase.title,
            _there(parts),
            taken + pool.bytes,
            engine=f"{phase.section}.engine",
            tokens=pool.tokens,
        )

    def _reference(self, phase: Updating | RollingOut, target: Target) -> list[Part]:
        # The reference of adapters is what they are for.
        if phase.policy is None or not phase.policy.kl or self.architecture.lora is not None:
            return []
        return [Part("reference", self._parameters(target), "policy.kl")]

    def _state(self, optimization: AdamWConfig | None, target: Target) -> list[Part]:
        if optimization is None:
            return []
        shapes, trained = self._any_update(target).shapes, self._trained_dtype(target)
        state, _ = state_bytes(optimization.optimizer, shapes, trained, self._sharing(target))
        return [Part("optimizer", state, optimization.optimizer)]

    def _sharing(self, target: Target) -> int:
        """Ranks that share what is trained: of adapters each has all."""
        return target.ranks if self.architecture.lora is None else 1

    def _trained_dtype(self, target: Target) -> torch.dtype:
        """Of gradients and moments too."""
        return target.parameters if self.architecture.lora is None else torch.float32

    def _parameters(self, target: Target) -> int:
        """Bytes that a rank holds of them."""
        return target.shard(self._any_update(target).parameters)

    def _any_update(self, target: Target) -> UpdateBytes:
        return self._counted(Passes(1, False, target.parameters, False, False))

    def _activations(self, passes: Passes, recomputed: bool) -> int:
        """Whatever the loss is."""
        forward = replace(
            passes,
            recomputed=recomputed,
            policy=False,
            entropy=False,
            sums_gradients=False,
            sharded=False,
            offloaded=False,
        )
        return self._forward(forward)


def _there(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.bytes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
