"""Which sequences compute how many tokens in the next step, and on which pages.

Everything that holds pages is a Branch, and branches are ranked: by arrival of their generation,
then in the order of its text. When the pool runs short, the branch that ranks last is preempted: it
releases its pages and computes them again later. So the first in rank always advances, and every
generation ends.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from threadweaver.generate.pages import Copy, OutOfPages, PagePool, PageTable
from threadweaver.generate.weaver import Request

Rank = tuple[int, ...]


@dataclass(eq=False)
class Branch:
    """Tokens of one path, and the pages of those that were computed.

    Attributes:
        rank: unique; a lower rank keeps its pages longer.
        ids: all tokens, [T].
        family: the branches of all generations of the same prompt.
        table: where the keys and values of ids[:table.length] lie.
    """

    rank: Rank
    ids: list[int] = field(repr=False)
    family: Family = field(repr=False)
    table: PageTable = field(default_factory=PageTable, repr=False)

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.ids) - self.table.length


@dataclass(eq=False)
class Sequence(Branch):
    """A branch that is being decoded, for one open request.

    Attributes:
        key: of its random draws (sampler.stream_key).
        logprobs, sampled_logprobs: of the tokens after the context.
        script: tokens to take instead of drawn ones, the whole completion; None: draw.
        is_open: its last token is still to come. A step that is launched early may hold others.
    """

    request: Request = field(kw_only=True)
    key: int = field(kw_only=True)
    logprobs: list[float] = field(default_factory=list, repr=False)
    sampled_logprobs: list[float] = field(default_factory=list, repr=False)
    script: list[int] | None = field(default=None, repr=False)
    is_open: bool = True

    @property
    def completion(self) -> list[int]:
        return self.ids[len(self.request.context) :]


@dataclass(eq=False)
class Family:
    """All branches of one prompt; those of one generation have a common first number in rank.

    Attributes:
        prompt_length: tokens that all of them share.
        branches: those in the scheduler.
        unfinished: generations that are not done.
        stem: holds the prompt's pages for generations that have yet to start.
    """

    prompt_length: int
    branches: list[Branch] = field(default_factory=list, repr=False)
    unfinished: int = 0
    stem: Branch | None = field(default=None, repr=False)


@dataclass
class Batch:
    """One step: the last counts[s] tokens up to sequences[s].table.length are new.

    Attributes:
        copies: pages to copy before anything is written.
    """

    sequences: list[Sequence]
    counts: list[int]
    copies: list[Copy]


class Scheduler:
    """Holds every branch from `add` to `remove`.

    Args:
        max_sequences: most sequences of a step.
        max_batch_tokens: most new tokens of a step; prefills go in chunks that fit.
    """

    def __init__(self, pool: PagePool, max_sequences: int, max_batch_tokens: int):
        self.pool = pool
        self.preemptions = 0
        self._max_sequences = max_sequences
        self._max_batch_tokens = max(max_batch_tokens, max_sequences)
        # Each in order of rank. `kept` are branches that are not decoded: a join or a late
        # generation may yet continue them.
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._kept: list[Branch] = []
        self._ahead: Batch | None = None  # the next step, if it is under way

    @property
    def has_room(self) -> bool:
        """Whether a step could advance more sequences than there are."""
        return not self._waiting and len(self._running) < self._max_sequences

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_rank)
        sequence.family.branches.append(sequence)

    def keep(self, branch: Branch) -> None:
        """Stops decoding a branch; it holds its pages until they are needed elsewhere."""
        if isinstance(branch, Sequence) and branch in self._running:
            self._running.remove(branch)
            if self._ahead is not None and branch in self._ahead.sequences:
                self.pool.drop_last(branch.table)
        else:
            branch.family.branches.append(branch)
        insort(self._kept, branch, key=_rank)

    def remove(self, branch: Branch) -> None:
        """Releases its pages."""
        if isinstance(branch, Sequence) and branch in self._running:
            self._running.remove(branch)
        elif isinstance(branch, Sequence) and branch in self._waiting:
            self._waiting.remove(branch)
        else:
            self._kept.remove(branch)
        branch.family.branches.remove(branch)
        self.pool.release(branch.table)

    def schedule(self) -> Batch:
        """The next step: its pages are taken and its tables lengthened.

        Empty if there is nothing to decode.
        """
        if (ahead := self._ahead) is not None:
            self._ahead = None
            if not set(self._running).isdisjoint(ahead.sequences):
                return ahead
        self._admit()
        # Decoding goes before prefill, so that a long prompt does not hold up running sequences.
        by_need = sorted(self._running, key=lambda s: s.pending > 1)
        batch, counts, room = [], [], self._max_batch_tokens
        for sequence in by_need:
            count = min(sequence.pending, room)
            if count:
                batch.append(sequence)
                counts.append(count)
                room -= count
        while True:
            try:
                copies = self.pool.append([s.table for s in batch], counts)
            except OutOfPages:
                victim = self._last_holder()
                self._give_up(victim)
                if victim in batch:
                    at = batch.index(victim)
                    del batch[at], counts[at]
                continue
            return Batch(batch, counts, copies)

    def look_ahead(self) -> Batch | None:
        """The step after the one that is being computed, if that one adds a token to every running
        sequence; None if more or less is to be computed next.

        Call it when all tokens are computed but for those of that step. The device may start on it:
        `schedule` returns it next, whatever is added, kept or removed until then, if any sequence
        of it still runs. One that is kept leaves without its token in it.
        """
        running = self._running
        if self._waiting or not running or any(s.pending for s in running):
            return None
        try:
            copies = self.pool.append([s.table for s in running], [1] * len(running))
        except OutOfPages:
            return None
        self._ahead = Batch(list(running), [1] * len(running), copies)
        return self._ahead

    def _admit(self) -> None:
        """Moves waiting sequences to the running ones, in order, as far as slots and pages go."""
        for sequence in list(self._waiting):
            if len(self._running) == self._max_sequences:
                return
            if not sequence.table.length and self._waits_for_a_prefix(sequence):
                continue
            if not self._fits(sequence):
                return
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_rank)

    def _waits_for_a_prefix(self, sequence: Sequence) -> bool:
        """Forks the branch with the longest shared prefix for a sequence without pages. True if
        that branch has yet to compute the prefix: the sequence then waits for it."""
        most, source = 0, None
        for branch in sequence.family.branches:
            if branch is sequence:
                continue
            shared = self._shared_length(sequence, branch)
            if shared > most:
                most, source = shared, branch
        if source is None:
            return False
        if source.table.length < most:
            return True
        sequence.table = self.pool.fork(source.table, most)
        return False

    def _shared_length(self, sequence: Sequence, branch: Branch) -> int:
        """Tokens of a sequence that a branch has computed, or will have if it is running; without
        the last token, which gives the logits."""
        there = len(branch.ids) if branch in self._running else branch.table.length
        if there == 0:
            return 0
        if branch.rank[0] != sequence.rank[0]:
            shared = sequence.family.prompt_length
        else:
            shared = common_prefix_length(sequence.ids, branch.ids)
        return min(shared, there, len(sequence.ids) - 1)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are pages for all its tokens, and one more for each running sequence.

        To make room, branches of higher rank that are not running are preempted. If nothing runs,
        it fits in any case: `schedule` preempts others for it.
        """
        pages = -(-len(sequence.ids) // self.pool.page_size) - len(sequence.table.pages) + 1
        needed = pages + len(self._running)
        while self.pool.free_pages < needed:
            idle = [b for b in self._holders() if b.rank > sequence.rank and b not in self._running]
            if not idle:
                return not self._running
            self._give_up(idle[-1])
        return True

    def _holders(self) -> list[Branch]:
        """Branches that have pages or are about to get some, in order of rank."""
        idle = [b for b in (*self._waiting, *self._kept) if b.table.length]
        return sorted((*self._running, *idle), key=_rank)

    def _last_holder(self) -> Branch:
        first = self._running[0]
        return next(branch for branch in reversed(self._holders()) if branch is not first)

    def _give_up(self, branch: Branch) -> None:
        self.pool.release(branch.table)
        if isinstance(branch, Sequence) and branch in self._running:
            self.preemptions += 1
            self._running.remove(branch)
            insort(self._waiting, branch, key=_rank)


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Of two lists, by bisection over comparisons at the speed of C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _rank(branch: Branch) -> Rank:
    return branch.rank
