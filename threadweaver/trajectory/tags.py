"""The tags of a trajectory and the pattern of thread headers (docs/semantics.md, "Trajectory")."""

from __future__ import annotations

import re

BLOCK_TAGS = (
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
)
# Every tag that is one special token. <Conclusion> stands in old data only: read, never written.
TAGS = (*BLOCK_TAGS, "<Conclusion>", "</Conclusion>", "<think>", "</think>")

MAX_OUTLINES = 50

# A forced header, after <Thread>. The state machine also accepts numbers like 1.2
# (docs/semantics.md, "State machine", 2); only whole numbers are well formed.
THREAD_HEADER = re.compile(r"\s*[0-9]+(?:\.[0-9]+)*\s*:")
