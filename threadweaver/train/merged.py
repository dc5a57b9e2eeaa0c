"""The groups of a batch, each merged into tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from threadweaver.train.groups import Group
from threadweaver.train.policy_batch import PolicyTrie, policy_group


@dataclass
class Merged:
    """What this rank makes of the groups of a batch.

    Attributes:
        tries: of each group; of one that has no signal, or that another rank decoded, none.
        dropped_calls, skipped_rollouts: as in `PolicyGroup`, of all.
    """

    tries: list[list[PolicyTrie]]
    dropped_calls: int = 0
    skipped_rollouts: int = 0


def merge(groups: Sequence[Group], max_tokens: int) -> Merged:
    """Merges each group that has a signal, and that this rank decoded.

    Args:
        max_tokens: of a trie.
    """
    merged = Merged([[] for _ in groups])
    for group, tries in zip(groups, merged.tries, strict=True):
        if group.has_signal and group.is_here:
            rollouts = [g.rollout for g in group.graded if g.rollout is not None]
            made = policy_group(rollouts, group.advantages, max_tokens)
            tries += [replace(trie, sources=(group.source,)) for trie in made.tries]
            merged.dropped_calls += made.dropped_calls
            merged.skipped_rollouts += made.skipped_rollouts
    return merged
