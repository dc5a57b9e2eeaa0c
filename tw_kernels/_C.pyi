from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_trie(
    paths: Sequence[Any], weights: Sequence[Any] | None
) -> tuple[
    NDArray[np.int64],  # tokens
    NDArray[np.int64],  # positions
    NDArray[np.int64],  # parents
    NDArray[np.int32],  # subtree_ends
    NDArray[np.float32],  # positive weights
    NDArray[np.float32],  # negative weights
    NDArray[np.int32],  # path ends
]: ...
def node_segments(subtree_ends: NDArray[np.int32]) -> NDArray[np.int32]: ...
def block_schedule(
    subtree_ends: NDArray[np.int32], block_q: int, block_kv: int
) -> tuple[NDArray[np.int32], ...]: ...
