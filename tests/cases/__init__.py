"""Inputs that once failed, one a file, each a member of a kind.

`fault()` says what is wrong, in one line; None: nothing is. As a script a case exits with 1, and
that line on stderr, while the fault is there. `tests/test_cases.py` runs them all.
"""
