"""Token latency of a trajectory: its longest path (docs/semantics.md, "Path metrics")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from threadweaver.trajectory.calls import parse_ids
from threadweaver.trajectory.codec import Codec
from threadweaver.trajectory.parser import Thread


@dataclass(frozen=True)
class PathLengths:
    """Lengths in tokens.

    Attributes:
        total_tokens: all tokens.
        longest_path_tokens: the critical path: tokens outside threads, where the tags of blocks and
            threads count, and for each block its longest thread.
        blocks: number of blocks, nested ones included.
        mean_threads_per_block: 0 without a block.
    """

    total_tokens: int
    longest_path_tokens: int
    blocks: int
    mean_threads_per_block: float

    @property
    def acceleration(self) -> float:
        """1 - longest / total; 0 for an empty trajectory."""
        return 1 - self.longest_path_tokens / self.total_tokens if self.total_tokens else 0.0

    def as_dict(self) -> dict[str, float]:
        """All figures by name, for JSON."""
        return {**asdict(self), "acceleration": self.acceleration}


def path_lengths(ids: Sequence[int], codec: Codec, *, max_depth: int = 1) -> PathLengths:
    """Path metrics of a response.

    An unclosed block or thread counts as if closed at the end; stray tags are literal content.

    Args:
        ids: the response alone, [T]; a prompt would count as sequential tokens.
        max_depth: how deep blocks nest; a thread's length is its own longest path.
    """
    ids, main = parse_ids(ids, codec, 0, max_depth)
    threads_per_block = [len(block.threads) for block in main.all_blocks()]
    blocks = len(threads_per_block)
    return PathLengths(
        total_tokens=len(ids),
        longest_path_tokens=_longest_path(main),
        blocks=blocks,
        mean_threads_per_block=sum(threads_per_block) / blocks if blocks else 0.0,
    )


def _longest_path(thread: Thread) -> int:
    length = thread.body_end - thread.body_start
    for block in thread.blocks:
        length -= sum(t.body_end - t.body_start for t in block.threads)
        length += max(map(_longest_path, block.threads), default=0)
    return length
