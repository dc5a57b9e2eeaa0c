"""Generation: the fork-join state machine of one response, and the KV pages it is decoded on.

Neither knows a model: a Weaver says what to decode and what is shared, a PagePool where it lies.
"""

from threadweaver.generate.pages import Copy, OutOfPages, PagePool, PageTable, Writes
from threadweaver.generate.weaver import LimitCounts, Request, RequestId, Weaver

__all__ = [
    "Copy",
    "LimitCounts",
    "OutOfPages",
    "PagePool",
    "PageTable",
    "Request",
    "RequestId",
    "Weaver",
    "Writes",
]
