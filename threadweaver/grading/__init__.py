"""Grading of answers in processes that may be killed: `judge.Judge`, and what runs in them.

Imports nothing of the rest, torch least of all, so that they start fast.
"""
