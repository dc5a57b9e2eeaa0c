"""Writes problems with a sequential response each, as a model could have worked them out.

    python examples/annotate/problems.py --out runs/annotate/problems.jsonl --count 20

A row of your own needs `question` and `answer` alone: what has no response is answered by the
student first.
"""

import argparse
import json
import random
from pathlib import Path

RESPONSE = """<think>
The shop sells two kinds of goods, and what it takes in is the sum of both.

First, the apples: {a} boxes at {b} coins each. I split the price into {b10} and {b1}.
{a} times {b10} is {ab10}, and {a} times {b1} is {ab1}, each of them a small product.
Adding the two, {ab10} + {ab1} = {ab}, so the apples bring in {ab} coins in all.

Second, in the same way as the apples, the rice: {c} sacks at {d} coins each. The price is split \
into {d10} and {d1}.
{c} times {d10} is {cd10}, and {c} times {d1} is {cd1}, each of them a small product.
Adding the two, {cd10} + {cd1} = {cd}, so the rice brings in {cd} coins in all.

Together, {ab} + {cd} = {sum} coins.
</think>

The shop takes in \\boxed{{{sum}}} coins."""


def problem(rng: random.Random) -> dict:
    a, b, c, d = (rng.randint(11, 99) for _ in range(4))
    parts = {"a": a, "b": b, "c": c, "d": d, "ab": a * b, "cd": c * d, "sum": a * b + c * d}
    for price, count in (("b", "a"), ("d", "c")):
        tens, ones = parts[price] // 10 * 10, parts[price] % 10
        parts |= {f"{price}10": tens, f"{price}1": ones}
        parts |= {f"{count}{price}10": parts[count] * tens, f"{count}{price}1": parts[count] * ones}
    return {
        "question": f"A shop sells {a} boxes of apples at {b} coins each and {c} sacks of rice at "
        f"{d} coins each. How many coins does it take in?",
        "response": RESPONSE.format(**parts),
        "answer": str(parts["sum"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for _ in range(options.count):
            file.write(json.dumps(problem(rng)) + "\n")
    print(f"{options.out}: {options.count} problems")


if __name__ == "__main__":
    main()
