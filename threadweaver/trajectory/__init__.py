"""The trajectory format: tags, ids, format check, calls, losses, path lengths.

Knows nothing of models (except that `add_tags` can extend one), kernels or generation.
"""

from threadweaver.trajectory.calls import Call, extract_calls
from threadweaver.trajectory.codec import Codec
from threadweaver.trajectory.format import check_format
from threadweaver.trajectory.loss import LossTrie, loss_trie
from threadweaver.trajectory.paths import PathLengths, path_lengths
from threadweaver.trajectory.tags import TAGS
from threadweaver.trajectory.vocabulary import add_tags

__all__ = [
    "TAGS",
    "Call",
    "Codec",
    "LossTrie",
    "PathLengths",
    "add_tags",
    "check_format",
    "extract_calls",
    "loss_trie",
    "path_lengths",
]
