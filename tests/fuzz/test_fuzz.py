"""Whatever a user gives a command: one line and exit code 2, or it is done as documented.

Another seed or more inputs, or one of them again: `python -m tests.fuzz`.
"""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import fuzz


def test_a_hundred_bad_inputs_are_refused_in_one_line_or_done_right(tmp_path):
    faults = fuzz(tmp_path, seed=1, numbers=range(100))
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_two_thousand_bad_inputs_are_refused_in_one_line_or_done_right(tmp_path, first):
    faults = fuzz(tmp_path, seed=0, numbers=range(first, first + 250))
    assert not faults, "\n".join(faults)
