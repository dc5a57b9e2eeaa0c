"""Generation: fork-join rollouts on shared KV pages, in the trainer's own process.

weaver      the state machine of one response; says what to decode and what is shared
pages       the pool of KV pages, and where the tokens of a sequence lie in it
scheduler   which sequences compute how many tokens in the next step
runner      the model: one forward pass over a step
sampler     from logits to tokens
engine      all of them together; the only name here that needs transformers
load        an engine from a model on disk
transcript  the text of a response as it grows; display shows it, outcome sums it up
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threadweaver.generate.engine import Engine
    from threadweaver.generate.rollout import Completion, Rollout
    from threadweaver.generate.settings import GenerationSettings
    from threadweaver.generate.weaver import LimitCounts, Request, RequestId, Weaver

__all__ = [
    "Completion",
    "Engine",
    "GenerationSettings",
    "LimitCounts",
    "Request",
    "RequestId",
    "Rollout",
    "Weaver",
]


_MODULES = {
    "Completion": "rollout",
    "Engine": "engine",
    "GenerationSettings": "settings",
    "LimitCounts": "weaver",
    "Request": "weaver",
    "RequestId": "weaver",
    "Rollout": "rollout",
    "Weaver": "weaver",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a Weaver needs no transformers, and the command, whose package this
    # is, can end cleanly at Ctrl-C while it imports torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
