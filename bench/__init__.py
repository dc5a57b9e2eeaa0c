"""Benchmarks of ours and of peers, in one run on the same inputs: `python -m bench --help`."""

import threadweaver  # noqa: F401 - before torch: it sets how OpenMP's idle threads wait
