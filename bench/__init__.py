"""Benchmarks: ours and the peers in one run, on one set of inputs: `python -m bench --help`."""

import threadweaver  # noqa: F401 - before torch: it sets how OpenMP's idle threads wait
