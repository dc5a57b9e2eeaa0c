"""The ids of a generation while it is being decoded, in their final order, without end tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from threadweaver.generate.engine import Generation
from threadweaver.generate.weaver import RequestId
from threadweaver.trajectory import Codec


@dataclass(frozen=True)
class Piece:
    """The tokens that one request has decoded so far.

    Attributes:
        request: its id.
        forced: ids between the piece before it and this one: newline, thread header.
        tokens: decoded ids, without an end token.
        is_open: whether the request is open.
    """

    request: RequestId
    forced: list[int] = field(repr=False)
    tokens: list[int]
    is_open: bool

    @property
    def ids(self) -> list[int]:
        return self.forced + self.tokens


def pieces(generation: Generation, codec: Codec) -> list[Piece]:
    """One for each request that was opened, in the order of the text."""
    contexts = {id: c.context for id, c in generation.completions.items()}
    tokens = {id: c.tokens for id, c in generation.completions.items()}
    for id, sequence in generation.open.items():
        contexts[id] = sequence.request.context
        tokens[id] = sequence.completion
    return [
        Piece(
            id,
            _forced(id, contexts, codec),
            _without_end(tokens[id], codec),
            is_open=id in generation.open,
        )
        for id in sorted(tokens)
    ]


def _forced(id: RequestId, contexts: dict[RequestId, list[int]], codec: Codec) -> list[int]:
    line, number = id[:-1], id[-1]
    newline = list(codec.newline_ids)
    if number == 0:
        if not line:
            return []
        context = contexts[id]
        start = context[::-1].index(codec.tag_ids["<Thread>"]) + 1
        return (newline if line[-1] == 0 else []) + context[-start:]
    joins = (*line, number - 1, 0, 0) in contexts
    return newline if joins else []


def transcript(generation: Generation, codec: Codec) -> list[int]:
    """The response, or all that was decoded of it so far, threads one after the other."""
    if generation.weaver.done:
        return _without_end(generation.weaver.response, codec)
    return [id for piece in pieces(generation, codec) for id in piece.ids]


def settled(generation: Generation, codec: Codec) -> list[int]:
    """The part of the response that no later token changes, but for the response's limit: it ends
    at a thread that still runs or ended early."""
    if generation.weaver.done:
        return _without_end(generation.weaver.response, codec)
    ids: list[int] = []
    last: Piece | None = None
    for piece in pieces(generation, codec):
        if last is not None and (last.is_open or not _leads_to(last, piece, codec)):
            break
        ids += piece.ids
        last = piece
    return ids


def _without_end(ids: list[int], codec: Codec) -> list[int]:
    return ids[:-1] if ids and ids[-1] in codec.end_ids else ids


def _leads_to(piece: Piece, following: Piece, codec: Codec) -> bool:
    """Whether only the forced ids of the following piece come between it and a closed piece: the
    piece ended in </Thread>, or the following one is a fork or continuation of it."""
    line = piece.request[:-1]
    ended = piece.tokens[-1:] == [codec.tag_ids["</Thread>"]]
    return ended or following.request[: len(line)] == line
