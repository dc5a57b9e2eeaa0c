"""The page of a trie: its tokens in flat order, its mask, and the blocks of its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from threadweaver.data import DataError
from threadweaver.trajectory import Codec, loss_trie
from threadweaver.view.page import as_json, build_page, packed
from threadweaver.view.rows import Row
from tw_kernels import Trie, TrieLayout


class Blocks(NamedTuple):
    """The schedule of a trie, as the kernels walk it.

    Attributes:
        full, partial: how many (query block, KV block) pairs there are without and with a mask.
    """

    row_ptr: np.ndarray
    full_end: np.ndarray
    kv_blocks: np.ndarray
    full: int
    partial: int


def blocks_of(layout: TrieLayout, block_q: int, block_kv: int) -> Blocks:
    """The schedule for these block sizes."""
    schedule = layout.block_schedule(block_q, block_kv)
    row_ptr, full_end, kv_blocks = (t.cpu().numpy() for t in schedule[:3])
    full = int((full_end - row_ptr[:-1]).sum())
    return Blocks(row_ptr, full_end, kv_blocks, full, len(kv_blocks) - full)


def trie_of(row: Row, codec: Codec, max_depth: int) -> Trie:
    """The trie of the calls of a trajectory; its column "weights" is 1 where a call completed a
    token.

    Raises:
        DataError: the response is empty, or the chat template refuses its prompt.
    """
    try:
        prompt = codec.encode_prompt(row.prompt)
        ids = [*prompt, *codec.encode(row.response)]
        return loss_trie(ids, codec, len(prompt), "completions", max_depth=max_depth).trie
    except ValueError as error:
        raise DataError(f"{row.source}: {error}") from error


def trie_page(
    trie: Trie,
    text_of: Callable[[int], str],
    title: str,
    *,
    block_q: int,
    block_kv: int,
) -> str:
    """The text of the page.

    Args:
        text_of: the text of a token id.
        block_q, block_kv: rows and columns of a block of the schedule.
    """
    layout = trie.layout()
    blocks = blocks_of(layout, block_q, block_kv)
    ids, places = np.unique(trie.tokens.numpy(), return_inverse=True)
    sampled = trie.columns.get("weights")
    about = {
        "title": title,
        "tokens": len(trie),
        "paths": trie.num_paths,
        "longest": layout.longest_path,
        "visible": layout.visible_pairs,
        "block_q": block_q,
        "block_kv": block_kv,
        "full": blocks.full,
        "partial": blocks.partial,
        # Whole blocks, also where they reach beyond the trie.
        "computed": len(blocks.kv_blocks) * block_q * block_kv,
    }
    data = {
        "about": about,
        "texts": [text_of(int(id)) for id in ids],
        "tokens": packed(places.reshape(-1)),
        "ids": packed(ids),
        "ends": packed(trie.subtree_ends.numpy()),
        "sampled": "" if sampled is None else packed(sampled.numpy() > 0),
        "row_ptr": packed(blocks.row_ptr),
        "full_end": packed(blocks.full_end),
        "kv_blocks": packed(blocks.kv_blocks),
    }
    return build_page("trie", f"{title}: trie", {n: as_json(v) for n, v in data.items()})
