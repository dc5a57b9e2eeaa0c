"""Replay: drives an engine along a recorded trajectory, so that modes compare on the same tokens.

script = script_of(ids, prompt_length, codec, settings)
engine.add(ids[:prompt_length], settings, script=script)
"""

from __future__ import annotations

from collections.abc import Sequence

from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Request, RequestId
from threadweaver.trajectory import Codec, extract_calls
from threadweaver.trajectory.ids import token_ids

_ANY_LENGTH = 2**31
_SHOWN = 8  # tokens that an error shows


def script_of(
    ids: Sequence[int], prompt_length: int, codec: Codec, settings: GenerationSettings
) -> dict[RequestId, list[int]]:
    """The completions with which a generation repeats a finished trajectory.

    An ending that may have been forced ("\\n</Thread>", say) or decoded counts as decoded if the
    request has room for it. In sequential mode the script is {(0,): response}.

    Args:
        ids: prompt and response, [T]: a list, NumPy array or 1-D tensor.
        prompt_length: how many of them are the prompt.
        settings: those it was recorded with, or others whose limits leave it room.

    Raises:
        ValueError: the state machine cannot produce this response, with the first token that
            differs; the prompt is empty; prompt_length or a setting is out of range.
    """
    max_depth = settings.max_depth if settings.mode == "parallel" else 0
    calls = extract_calls(ids, codec, prompt_length, max_depth=max_depth)
    ids = token_ids(ids, "trajectory")
    weaver = settings.weaver(ids[:prompt_length], codec, _ANY_LENGTH)
    script: dict[RequestId, list[int]] = {}
    for call in calls:
        context = call.context
        request = next((r for r in weaver.requests() if r.context == context), None)
        # Without a request these tokens were forced, or are impossible, which `_check` finds.
        if request is not None:
            script[request.id] = tokens = _decoded_part(call.completion, request, codec)
            stopped = tokens and tokens[-1] in request.stop_ids
            weaver.complete(request, tokens, "stop" if stopped else "length")
    while not weaver.done:
        weaver.complete(weaver.requests()[0], [], "length")
    _check(ids[prompt_length:], weaver.response, prompt_length, codec)
    return script


def _decoded_part(completion: list[int], request: Request, codec: Codec) -> list[int]:
    """The tokens that the model can have decoded: up to a stop token and the request's limit."""
    forced = [*codec.newline_ids, codec.tag_ids["</Thread>"]]
    if len(completion) > request.max_tokens and completion[-len(forced) :] == forced:
        completion = completion[: -len(forced)]
    tokens = completion[: request.max_tokens]
    stops = (i for i, token in enumerate(tokens, 1) if token in request.stop_ids)
    return tokens[: next(stops, len(tokens))]


def _check(recorded: list[int], replayed: list[int], prompt_length: int, codec: Codec) -> None:
    if recorded == replayed:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(recorded, replayed, strict=False)) if a != b),
        min(len(recorded), len(replayed)),
    )
    there, instead = (codec.decode(x[at : at + _SHOWN]) for x in (recorded, replayed))
    raise ValueError(
        f"token {prompt_length + at}: the trajectory goes on with {there!r}, but with these "
        f"settings the state machine comes to {instead!r}"
    )
