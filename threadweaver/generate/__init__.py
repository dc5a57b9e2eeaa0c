"""Generation: fork-join rollouts on shared KV pages, in the trainer's own process.

    weaver      the state machine of one response; says what to decode and what is shared
    pages       the pool of KV pages, and where the tokens of a sequence lie in it
    scheduler   which sequences compute how many tokens in the next step
    runner      the model: one forward pass over a step
    sampler     from logits to tokens
    engine      all of them together; imports torch and transformers
    load        an engine from a model on disk
    transcript  the text of a response as it grows; display shows it, outcome sums it up

The first two know no model.
"""

from threadweaver.generate.pages import Copy, OutOfPages, PagePool, PageTable, Writes
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.weaver import LimitCounts, Request, RequestId, Weaver

__all__ = [
    "Completion",
    "Copy",
    "LimitCounts",
    "OutOfPages",
    "PagePool",
    "PageTable",
    "Request",
    "RequestId",
    "Rollout",
    "Weaver",
    "Writes",
]
