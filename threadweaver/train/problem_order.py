"""The order in which P-GRPO takes up problems."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, count, islice

from threadweaver.tasks import Problem


def in_passes(problems: Sequence[Problem], seed: int, start: int, size: int) -> list[Problem]:
    """`size` problems, the `start` first ones left out, of pass after pass over all of them, each
    in an order of its own."""

    def one_pass(number: int) -> list[Problem]:
        order = list(problems)
        random.Random(f"{seed}/{number}").shuffle(order)
        return order

    number, skipped = divmod(start, len(problems))
    passes = chain.from_iterable(map(one_pass, count(number)))
    return list(islice(passes, skipped, skipped + size))
