"""Settings of a generation (mode, limits, sampling) and of an engine (sizes)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.weaver import Mode, Weaver
from threadweaver.trajectory import Codec, PathLengths, path_lengths
from threadweaver.trajectory.tags import MAX_OUTLINES

# Responses that are decoded together: each takes a few KB until it begins, and of one that is done
# its text is held.
MOST_RESPONSES = 1_000_000
MOST_SIZE = 2**31 - 1


class PromptTooLong(ValueError):  # noqa: N818 (named for what was found)
    """A prompt that leaves no room for a response."""


@dataclass(frozen=True)
class EngineSizes:
    """The sizes of an engine.

    Args:
        kv_gigabytes: memory for keys and values, in 1e9 bytes. auto: at most what max_sequences of
            the longest context take; of a GPU whatever is left when all else is there and what a
            step takes is set aside; of a host a quarter of its memory, taken as it is filled.
        page_size: tokens a KV page.
        max_sequences: most threads, of all responses together, that a step advances.
        max_batch_tokens: most new tokens of a step; longer prefills go in chunks.

    Raises:
        ValueError: a size out of range; names it.
    """

    kv_gigabytes: float | Literal["auto"] = "auto"
    page_size: int = 16
    max_sequences: int = 64
    max_batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.kv_gigabytes != "auto" and not 0 < self.kv_gigabytes < math.inf:
            raise ValueError(
                f"kv_gigabytes is {self.kv_gigabytes}: it must be above 0 and finite, or auto"
            )
        for name in ("page_size", "max_sequences", "max_batch_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
            if value > MOST_SIZE:
                raise ValueError(f"{name} is {value}: it must be at most {MOST_SIZE}")


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one response; the limits are those of `Weaver`.

    Args:
        mode: parallel: threads are decoded at the same time; sequential: the same model, one token
            after another, tags and all.
        max_tokens: most tokens of the response; less if the model's context ends before.
        max_depth: how deep blocks nest.
        max_threads: most threads of a block.
        max_thread_tokens: most tokens of a thread; null: as many as the response.
        max_blocks: most blocks on the main line and in each thread; null: any number.
        sampling: how tokens are drawn.
    """

    mode: Mode = "parallel"
    max_tokens: int = 4096
    max_depth: int = 1
    max_threads: int = MAX_OUTLINES
    max_thread_tokens: int | None = None
    max_blocks: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def weaver(self, prompt: list[int], codec: Codec, context_length: int) -> Weaver:
        """The state machine of a response, which together with its prompt fits the context.

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: the prompt is empty, or a setting is out of range.
        """
        if len(prompt) >= context_length:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, and the model's context ends at "
                f"{context_length}: shorten the prompt"
            )
        return Weaver(
            prompt,
            codec,
            min(self.max_tokens, context_length - len(prompt)),
            mode=self.mode,
            max_depth=self.max_depth,
            max_threads=self.max_threads,
            max_thread_tokens=self.max_thread_tokens,
            max_blocks=self.max_blocks,
        )

    def context_note(self, room: int, context_length: int) -> str | None:
        """A line to show if the least room of some prompts (`Engine.check`) is not max_tokens."""
        if room == self.max_tokens:
            return None
        return (
            f"max_tokens: {room:,} and not {self.max_tokens:,} after the longest prompt, since "
            f"the model's context ends at {context_length:,}"
        )

    def path_lengths(self, response: Sequence[int], codec: Codec) -> PathLengths:
        """Path metrics of a response, ids [T]. In sequential mode all of it is on the longest path;
        blocks are those that it wrote."""
        lengths = path_lengths(response, codec, max_depth=self.max_depth)
        if self.mode == "parallel":
            return lengths
        return replace(lengths, longest_path_tokens=lengths.total_tokens)
