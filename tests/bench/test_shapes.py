"""The cases of benchmarks have the sizes that their names say."""

import functools

import pytest

from bench import shapes


@pytest.mark.parametrize(
    "case",
    [
        shapes.star(1000),
        shapes.pack(8, 64),
        *(shapes.trajectory(n, blocks) for n, blocks in ((100, 1), (512, 2), (8192, 4))),
        shapes.tree_of_thoughts("sorting128ToT", 17),
        shapes.tree_of_thoughts("docmergeToT", 4),
    ],
    ids=lambda case: case.name,
)
def test_a_case_has_the_size_its_name_says(case):
    trie = case.trie
    name, _, size = case.name.partition("-")
    tree = functools.partial(shapes._trees().__getitem__, name)
    n = eval(size.replace("x", "*")) if name not in shapes._trees() else None
    assert len(trie) == (n or sum(tree()[int(size)]["sizes"]))
    assert not n or name != "star" or abs(trie.layout().density - 0.242) < 0.002


def test_the_long_trajectory_unrolls_to_194k():
    case = shapes.trajectory(34408, 6)
    assert len(case.trie) == 34408
    assert abs(case.unrolled - 194_000) < 1000
