"""Synthetic multiplication: schoolbook products whose every step a tiny model can learn.

47*86 in parallel: one thread for each digit of the second factor, lowest first; each multiplies the
first factor by its digit, column by column; after the join the partial products are added up::

    <think>
    <Parallel>
    <Outlines>
    <Outline>1: times 6</Outline>
    <Outline>2: times 8</Outline>
    </Outlines>
    <Thread>
    1: 047*6
    7*6=42, 42+0=42, carry 4, ones 2 so 42
    4*6=24, 24+4=28, carry 2, tens 8 so 282
    0*6=00, 00+2=02, carry 0, hundreds 2 so 0282</Thread><Thread>
    2: 047*8
    7*8=56, 56+0=56, carry 5, tens 6 so 56
    4*8=32, 32+5=37, carry 3, hundreds 7 so 376
    0*8=00, 00+3=03, carry 0, thousands 3 so 0376</Thread>
    </Parallel>
    ones 2
    tens 8+6+0 so 142
    hundreds 2+7+1 so 1042
    thousands 0+3+1 so 04042
    </think>
    \\boxed{4042}

Thread n works at the places from 10^(n-1) up; "so" precedes the result so far: the carry, then the
digits found, highest first. Three habits make every token a function of a few near or named ones:

- a digit needed elsewhere follows the name of its place;
- the result grows by one digit a line, so that nothing is ever read backwards;
- numbers are padded with zeros to a width set by the sizes of the factors alone, so all problems of
  one size have one layout (but for leading zeros of the answer).

More factors: block after block, each multiplying the running product by the next factor. The
sequential trajectory holds the same lines without blocks. Format: docs/semantics.md, "Trajectory".
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice

from threadweaver.data import trajectory_row
from threadweaver.tasks.boxed import boxes_number
from threadweaver.tasks.task import MOST_PROBLEMS, Problem, Split, check_count
from threadweaver.trajectory.tags import MAX_OUTLINES

PLACES = (
    "ones",
    "tens",
    "hundreds",
    "thousands",
    "ten-thousands",
    "hundred-thousands",
    "millions",
    "ten-millions",
    "hundred-millions",
    "billions",
)


def place_name(place: int) -> str:
    """The name of the digit worth 10^place."""
    return PLACES[place] if place < len(PLACES) else f"10^{place}"


def question(factors: Sequence[int]) -> str:
    """The prompt: the product to work out and a newline."""
    return "*".join(map(str, factors)) + "=?\n"


def trajectory(factors: Sequence[int], parallel: bool) -> str:
    """The worked answer to `question(factors)`, with blocks or, step for step the same, without.

    Raises ValueError for fewer than two factors, a factor below 1, or a second or later factor of
    more digits than a block may hold threads.
    """
    if len(factors) < 2 or min(factors) < 1:
        raise ValueError(f"factors must be two or more numbers of at least 1, not {list(factors)}")
    if max(map(len, map(str, factors[1:]))) > MAX_OUTLINES:
        raise ValueError(
            f"factors after the first must have at most {MAX_OUTLINES} digits: "
            f"a block holds one thread a digit and at most {MAX_OUTLINES} threads"
        )
    parts = ["<think>\n"]
    product = str(factors[0])
    for i, factor in enumerate(map(str, factors[1:])):
        if i > 0:
            parts.append(f"{product}*{factor}\n")
        works, partials = [], []
        for place, digit in enumerate(reversed(factor)):
            work, partial = _times_digit(product, digit, place)
            works.append(work)
            partials.append(partial)
        parts.append(_block(factor, works) if parallel else "".join(f"{w}\n" for w in works))
        product = partials[0]
        for place, partial in enumerate(partials[1:], start=1):
            lines, product = _add(product, partial, place)
            parts.append(lines)
    answer = product.lstrip("0")
    parts.append(f"</think>\n\\boxed{{{answer}}}")
    return "".join(parts)


def _times_digit(multiplicand: str, digit: str, place: int) -> tuple[str, str]:
    """The lines of multiplicand * digit * 10^place, and multiplicand * digit with its zeros.

    One leading zero on the multiplicand lets the last carry fall out of the same step as every
    other digit, so the product has len(multiplicand) + 1 digits.
    """
    padded = f"0{multiplicand}"
    lines = [f"{padded}*{digit}"]
    carry, result = 0, ""
    for i, top in enumerate(reversed(padded)):
        product = int(top) * int(digit)
        step = f"{top}*{digit}={product:02d}, {product:02d}+{carry}={product + carry:02d}"
        carry, found = divmod(product + carry, 10)
        result = f"{found}{result}"
        lines.append(f"{step}, carry {carry}, {place_name(place + i)} {found} so {carry}{result}")
    return "\n".join(lines), result


def _add(total: str, partial: str, place: int) -> tuple[str, str]:
    """The lines of total + partial * 10^place (place >= 1), and the sum with its zeros.

    The sum has len(partial) + place digits, which always fit: W digits times place + 1 digits have
    at most W + place + 1, and the partial product has W + 1.
    """
    result = total[len(total) - place :]
    lines = [f"{place_name(place - 1)} {result}\n"]
    upper = total[: len(total) - place].rjust(len(partial), "0")
    carry = 0
    for i, (a, b) in enumerate(zip(reversed(upper), reversed(partial), strict=True), start=place):
        step = f"{place_name(i)} {a}+{b}+{carry}"
        carry, found = divmod(int(a) + int(b) + carry, 10)
        result = f"{found}{result}"
        lines.append(f"{step} so {carry}{result}\n")
    return "".join(lines), result


def _block(factor: str, works: list[str]) -> str:
    outlines = "".join(
        f"<Outline>{n}: times {digit}</Outline>\n" for n, digit in enumerate(reversed(factor), 1)
    )
    threads = "".join(f"<Thread>\n{n}: {work}</Thread>" for n, work in enumerate(works, 1))
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n"


Factors = tuple[int, ...]


def split_problems(
    train: int, validation: int, digits: int = 2, factors: int = 2, seed: int = 0
) -> tuple[list[Factors], list[Factors]]:
    """`train` and `validation` different problems, each of `factors` factors of `digits` digits.

    A problem is an ordered tuple of factors; two problems are the *same question* if one reorders
    the other. No question is in both halves, in any order, and none twice in the validation half.
    Factors have exactly `digits` digits, so none is 0. The same arguments give the same split.

    Raises ValueError if a size is out of range or if there are not that many problems.
    """
    for name, value, least in (
        ("train", train, 0),
        ("validation", validation, 0),
        ("digits", digits, 1),
        ("factors", factors, 2),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
        if value > MOST_PROBLEMS:
            raise ValueError(f"{name} must be at most {MOST_PROBLEMS:,}, not {value}")
    if digits > MAX_OUTLINES:
        raise ValueError(
            f"digits must be at most {MAX_OUTLINES}, not {digits}: a block holds one thread a digit"
        )
    train_problems: list[Factors] = []
    validation_problems: list[Factors] = []
    held_out: set[Factors] = set()
    for problem in _all_problems(digits, factors, random.Random(seed)):
        if len(train_problems) == train and len(validation_problems) == validation:
            break
        asked = tuple(sorted(problem))
        if asked in held_out:
            continue
        if len(validation_problems) < validation:
            validation_problems.append(problem)
            held_out.add(asked)
        elif len(train_problems) < train:
            train_problems.append(problem)
    if len(validation_problems) < validation or len(train_problems) < train:
        choices = 10**digits - 10 ** (digits - 1)
        questions = math.comb(choices + factors - 1, factors)
        raise ValueError(
            f"train={train} and validation={validation} ask for more problems than exist: digits="
            f"{digits}, factors={factors} give {choices**factors} ({questions} up to order), "
            f"of which {len(validation_problems)} for validation leave {len(train_problems)} for "
            f"training; ask for fewer, or for more digits or factors"
        )
    return train_problems, validation_problems


def _all_problems(digits: int, factors: int, rng: random.Random) -> Iterator[Factors]:
    """Every problem once, in random order."""
    low = 10 ** (digits - 1)
    choices = 10**digits - low
    for index in _shuffled(choices**factors, rng):
        yield tuple(low + index // choices**i % choices for i in range(factors))


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """range(size) in random order, lazily: a Fisher-Yates shuffle that stores only moved entries,
    so a space of any size can be drawn from without repetition."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        chosen = moved.get(j, j)
        moved[j] = moved.get(i, i)
        moved.pop(i, None)
        yield chosen


def make_rows(problems: Sequence[Factors], parallel_share: float, seed: int) -> Iterator[dict]:
    """One data row a problem (`threadweaver.data.trajectory_row`).

    round(parallel_share * len(problems)) of the rows, chosen by the seed, hold the parallel
    trajectory, the others the sequential one. Raises ValueError if the share is not in [0, 1].
    """
    if not 0.0 <= parallel_share <= 1.0:
        raise ValueError(f"parallel_share must lie between 0 and 1, not {parallel_share}")
    count = round(parallel_share * len(problems))
    # A string seed, so that the draw differs from the one that picked the problems.
    in_parallel = set(random.Random(f"parallel {seed}").sample(range(len(problems)), count))
    for i, problem in enumerate(problems):
        response = trajectory(problem, parallel=i in in_parallel)
        yield trajectory_row(question(problem), response, math.prod(problem))


class Multiplication:
    """The task: products to work out, with a demonstration of either kind for each.

    Args:
        digits: digits of each factor.
        factors: factors of each product.
        validation: questions held out, in any order of their factors. These and no others are in
            the validation file that `python -m threadweaver.tasks multiplication` writes when given
            the same numbers.
        seed: which ones are held out.

    Raises:
        ValueError: a size out of range, or there are not that many questions.
    """

    ungraded = 0

    def __init__(self, digits: int = 2, factors: int = 2, validation: int = 500, seed: int = 0):
        _, self._validation = split_problems(0, validation, digits, factors, seed)
        self._held_out = {tuple(sorted(problem)) for problem in self._validation}
        self._digits = digits
        self._factors = factors

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """See `Task`; the seed is not the one that holds questions out."""
        if n is None:
            raise ValueError(
                "multiplication makes problems on demand: say how many (--n, task.problems)"
            )
        check_count(n)
        rng = random.Random(f"{split} {seed}")
        if split == "validation":
            chosen = rng.sample(self._validation, min(n, len(self._validation)))
        else:
            everything = _all_problems(self._digits, self._factors, rng)
            free = (p for p in everything if tuple(sorted(p)) not in self._held_out)
            chosen = list(islice(free, n))
        if len(chosen) < n:
            raise ValueError(
                f"multiplication has {len(chosen)} {split} problems, not {n}: digits="
                f"{self._digits}, factors={self._factors}, validation={len(self._validation)}; "
                "ask for fewer, or for more digits or factors, or change validation"
            )
        return [
            Problem(
                question(factors),
                str(math.prod(factors)),
                source=f"multiplication {'*'.join(map(str, factors))}",
                data=factors,
            )
            for factors in chosen
        ]

    def is_correct(self, response: str, problem: Problem) -> bool:
        return boxes_number(response, str(problem.answer))

    def demonstration(self, problem: Problem, parallel: bool) -> str:
        return trajectory(problem.data, parallel)
