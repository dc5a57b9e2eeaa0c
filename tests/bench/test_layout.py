"""bench.layout, in its --quick form, and its check."""

from bench import layout, shapes
from bench.running import suite_main
from tests.bench.schema import ONCE, checked_rows


def test_bench_layout_quick(tmp_path):
    assert suite_main(layout.SUITE, [*ONCE, "--json", str(tmp_path / "l.json")]) == 0
    rows = checked_rows(tmp_path / "l.json", layout.SUITE)
    # A trie takes O(N): 28 bytes a token at every size, and 4 for each path.
    tries = [row for row in rows if row["peer"] == layout.OURS]
    assert all(28 <= row["bytes_per_token"] < 28.3 for row in tries)


def test_the_layout_check_catches_a_moved_token_and_a_wrong_block():
    setup = layout.LayoutSetup(shapes.trajectory(512, 2))
    flat = layout.dict_trie(setup.case.paths)
    assert setup.check("planted", flat, 0) is None
    tokens = flat.tokens.clone()
    tokens[[3, 4]] = tokens[[4, 3]]
    assert setup.check("planted", flat._replace(tokens=tokens), 0) == "tokens differ"
    schedule = setup.case.trie.layout().block_schedule(layout.BLOCK_Q, layout.BLOCK_KV)
    assert setup.check("planted", schedule, 0) is None
    row = int((schedule.full_end > schedule.row_ptr[:-1]).nonzero()[0])
    full_end = schedule.full_end.clone()
    full_end[row] -= 1
    wrong = setup.check("planted", schedule._replace(full_end=full_end), 0)
    assert wrong == "the full blocks differ"
