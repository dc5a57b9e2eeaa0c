"""What a step takes to the device: all of it in one piece of memory, which one copy moves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tw_kernels import DecodePlan
from tw_kernels.sampling import SamplingRows
from tw_kernels.sampling.rows import Column


class StepInputs:
    """Views of one int32 buffer.

    Attributes:
        buffer: int32; [ids | positions | last | rows | plan].
        ids, positions: of the new tokens, int64 [T].
        last: which of them give logits, int64 [S].
        rows: how these are drawn from.
        plan: what the new tokens attend to.
    """

    def __init__(
        self, buffer: Tensor, tokens: int, samples: int, plan: DecodePlan, truncates: bool
    ):
        self.buffer = buffer
        sizes = _sizes(tokens, samples)
        wide = buffer[: 2 * sum(sizes)].view(torch.int64)
        self.ids, self.positions, self.last, rows = wide.split(sizes)
        self.rows = SamplingRows(rows.view(samples, len(Column)), truncates)
        at = buffer[2 * sum(sizes) :][: plan.buffer.numel()]
        self.plan = replace(plan, buffer=at, memo={})

    @classmethod
    def empty(
        cls,
        tokens: int,
        samples: int,
        plan: DecodePlan,
        truncates: bool,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> StepInputs:
        """Room for a plan of this size or capacity, and zeros in it."""
        size = 2 * sum(_sizes(tokens, samples)) + plan.buffer.numel()
        buffer = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned)
        return cls(buffer, tokens, samples, plan, truncates)

    @property
    def used(self) -> int:
        """Numbers of the buffer that are not padding of `plan.pages`, which stands at its end."""
        return self.buffer.numel() - self.plan.capacity.pages + self.plan.size.pages

    def take_plan(self, plan: DecodePlan) -> None:
        """Copies a plan of the same capacity, which lies on the CPU."""
        used = plan.buffer.numel() - plan.capacity.pages + plan.size.pages
        self.plan.buffer[:used] = plan.buffer[:used]
        self._is_of(plan)

    def take(self, other: StepInputs) -> None:
        """Copies other inputs of the same capacity without waiting for the device."""
        self.buffer[: other.used].copy_(other.buffer[: other.used], non_blocking=True)
        self._is_of(other.plan)

    def take_drawn(self, count: int, drawn: Tensor | None) -> None:
        """Turns the first ids from places among draws, int32 [S, 3], into the tokens drawn there;
        None: they are tokens."""
        if drawn is not None:
            self.ids[:count] = drawn[:, 0].index_select(0, self.ids[:count])

    def _is_of(self, plan: DecodePlan) -> None:
        self.plan.num_pages, self.plan.size = plan.num_pages, plan.size
        self.plan.memo.clear()


def _sizes(tokens: int, samples: int) -> list[int]:
    return [tokens, tokens, samples, samples * len(Column)]
