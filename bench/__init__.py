"""Benchmarks: ours and the peers in one run, on one set of inputs: `python -m bench --help`."""
