"""The trajectory format: tags, ids, format check, calls, losses, path lengths.

Knows nothing of models or generation, and needs no `transformers`.
"""

from threadweaver.trajectory.calls import Call, extract_calls
from threadweaver.trajectory.codec import Codec
from threadweaver.trajectory.format import (
    Violation,
    check_format,
    find_violations,
    opened_thinking,
    violations,
)
from threadweaver.trajectory.loss import LossTrie, loss_trie
from threadweaver.trajectory.paths import PathLengths, path_lengths
from threadweaver.trajectory.prompt import Message, Prompt, Rendered, TemplateConfig
from threadweaver.trajectory.redundancy import Redundancy, redundancy
from threadweaver.trajectory.tags import TAGS

__all__ = [
    "TAGS",
    "Call",
    "Codec",
    "LossTrie",
    "Message",
    "PathLengths",
    "Prompt",
    "Redundancy",
    "Rendered",
    "TemplateConfig",
    "Violation",
    "check_format",
    "extract_calls",
    "find_violations",
    "loss_trie",
    "opened_thinking",
    "path_lengths",
    "redundancy",
    "violations",
]
