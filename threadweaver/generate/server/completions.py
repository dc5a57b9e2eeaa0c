"""A request of the state machine in the words of a server, and its reply as token ids.

Servers differ in what they take and give. `find_dialect` tries, best first:

    token_ids   /v1/completions with ids as the prompt, and `return_token_ids` (vLLM)
    generate    /generate with `input_ids`, and `output_ids` (SGLang)
    logprobs    /v1/completions with ids, and tokens as "token_id:N" among log-probabilities (older
                vLLM)
    text        /v1/completions with text, in which special tokens are kept; replies are encoded
                again, so that their tokens need not be those that were sampled
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.server.address import Connection, ServerError
from threadweaver.generate.weaver import Reason, Request
from threadweaver.trajectory import Codec

Dialect = Literal["token_ids", "generate", "logprobs", "text"]
_PROBED_TOKENS = 8
_AS_ID = re.compile(r"token_id:([0-9]+)")
_PATHS = {"generate": "/generate"}
_UNKNOWN = (400, 404, 405, 415, 422, 501)  # statuses of a path, or a form, that a server lacks


class NoCompletion(ServerError):  # noqa: N818 (named for what came)
    """An answer that lacks what a completion has."""


class Reply(NamedTuple):
    """What a request was completed by, as `Weaver.complete` takes it."""

    tokens: list[int]
    reason: Reason


class _Answer(NamedTuple):
    """A server's answer to a request: ids, or text; why it ended; and what it stopped at."""

    tokens: list[int] | None
    text: str
    finish: str | None
    stopped_at: Any


@dataclass(frozen=True)
class Completions:
    """Requests to one model of a server.

    Args:
        vocabulary: all ids of the tokenizer are below it.
    """

    model: str
    dialect: Dialect
    codec: Codec
    vocabulary: int

    async def complete(
        self, server: Connection, request: Request, sampling: SamplingParams, seed: int
    ) -> Reply:
        """Has a request completed.

        Args:
            seed: of the draws, for servers that take one.

        Raises:
            ServerError: as `Connection.post`, or for an answer that cannot be one.
        """
        body = self._body(request.context, request.stop_ids, request.max_tokens, sampling, seed)
        answer = await self._ask(server, body)
        if answer.tokens is None:
            return self._from_text(answer, request)
        return self._from_ids(answer.tokens, answer, request)

    async def probe(self, server: Connection, text: str) -> _Answer:
        """The server's greedy continuation of a text."""
        ids = self.codec.encode(text)
        body = self._body(ids, [], _PROBED_TOKENS, SamplingParams(temperature=0), 0)
        return await self._ask(server, body)

    def _body(
        self,
        context: Sequence[int],
        stop_ids: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams,
        seed: int,
    ) -> dict[str, Any]:
        # All that a server might have other defaults for, by the model's generation_config.
        common: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        if self.dialect == "generate":
            sampled = {**common, "max_new_tokens": max_tokens, "no_stop_trim": True}
            return {"input_ids": list(context), "sampling_params": sampled}
        body = {
            **common,
            "model": self.model,
            "prompt": list(context),
            "max_tokens": max_tokens,
            "seed": seed & (2**63 - 1),
        }
        if self.dialect == "token_ids":
            return {**body, "return_token_ids": True}
        if self.dialect == "logprobs":
            return {**body, "logprobs": 0, "return_tokens_as_token_ids": True}
        # A server of text may know no more than these; it gets others where they are asked for,
        # and refuses or takes them.
        names = ["model", "max_tokens", "temperature", "top_p", "seed", "skip_special_tokens"]
        names += [name for name in ("top_k", "min_p") if getattr(sampling, name)]
        return {
            **{name: body[name] for name in names},
            # A server that encodes text puts the BOS token before it, as the tokenizer does.
            "prompt": self.codec.decode(context).removeprefix(self.codec.prompts.start),
            "stop": [self.codec.decode([id]) for id in stop_ids],
            "include_stop_str_in_output": True,
        }

    async def _ask(self, server: Connection, body: dict[str, Any]) -> _Answer:
        path = _PATHS.get(self.dialect, "/v1/completions")
        found = await server.post(path, body)
        try:
            return self._read(found)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise NoCompletion(
                f"server {path}: answers what is no completion: {str(found)[:200]}"
            ) from error

    def _read(self, found: dict[str, Any]) -> _Answer:
        if self.dialect == "generate":
            finish = found["meta_info"]["finish_reason"] or {}
            return _Answer(
                self._ids(found["output_ids"]), found["text"], finish["type"], finish.get("matched")
            )
        choice = found["choices"][0]
        tokens = None
        if self.dialect == "token_ids":
            tokens = self._ids(choice["token_ids"])
        elif self.dialect == "logprobs":
            names = (_AS_ID.fullmatch(name) for name in choice["logprobs"]["tokens"])
            tokens = self._ids([int(name[1]) for name in names if name])
            if len(tokens) < len(choice["logprobs"]["tokens"]):
                raise ValueError("tokens without their ids")
        if not isinstance(choice["text"], str):
            raise TypeError("text that is none")
        return _Answer(tokens, choice["text"], choice["finish_reason"], choice.get("stop_reason"))

    def _ids(self, found: Any) -> list[int]:
        if not all(type(id) is int for id in found):
            raise TypeError("ids that are no integers")
        for id in found:
            if not 0 <= id < self.vocabulary:
                raise ServerError(
                    f"server: its model gave the token {id:,}, and the tokenizer of --model has "
                    f"ids up to {self.vocabulary - 1:,}: it runs another model, or one without the "
                    "tags"
                )
        return list(found)

    def _from_ids(self, tokens: list[int], answer: _Answer, request: Request) -> Reply:
        stops = [n for n, id in enumerate(tokens, 1) if id in request.stop_ids]
        if stops:
            tokens = tokens[: stops[0]]
        elif answer.finish == "stop":
            # The token that ended it is not among those that it gave.
            ended = answer.stopped_at
            tokens = [*tokens, ended if ended in request.stop_ids else self.codec.eos_id]
        elif answer.finish != "length":
            raise _not_completed(answer)
        if len(tokens) > request.max_tokens:
            raise ServerError(
                f"server: {len(tokens)} tokens came back, and max_tokens was {request.max_tokens}"
            )
        return Reply(tokens, self._reason(tokens, request))

    def _from_text(self, answer: _Answer, request: Request) -> Reply:
        tokens = self.codec.encode(answer.text)
        stops = [n for n, id in enumerate(tokens, 1) if id in request.stop_ids]
        if stops:
            tokens = tokens[: stops[0]]
        elif answer.finish == "stop":
            tokens.append(self._stop_of(answer, request))
        elif answer.finish != "length":
            raise _not_completed(answer)
        tokens = tokens[: request.max_tokens]
        return Reply(tokens, self._reason(tokens, request))

    def _stop_of(self, answer: _Answer, request: Request) -> int:
        """The token that ended a text without it: what the server names, or what the format asks
        for next."""
        for id in request.stop_ids:
            if answer.stopped_at in (id, self.codec.decode([id])):
                return id
        in_outlines = answer.text.rfind("<Outlines>") > answer.text.rfind("</Outlines>")
        for tag, is_next in (("</Outlines>", in_outlines), ("</Thread>", True)):
            if is_next and (id := self.codec.tag_ids[tag]) in request.stop_ids:
                return id
        return self.codec.eos_id

    def _reason(self, tokens: Sequence[int], request: Request) -> Reason:
        if tokens and tokens[-1] in request.stop_ids:
            return "eos" if tokens[-1] in self.codec.end_ids else "stop"
        return "length"


def _not_completed(answer: _Answer) -> ServerError:
    return ServerError(f"server: a request ended by {answer.finish!r}: it was not completed")


async def find_dialect(
    server: Connection, model: str, codec: Codec, vocabulary: int, parallel: bool
) -> Completions:
    """The first dialect that a server speaks.

    Raises:
        ServerError: it speaks none; or, of a server that gives token ids, its tokenizer is another
            than the codec's, or it does not know the tags that decoding in `parallel` takes. Of one
            that gives text neither is known.
    """
    refused: list[str] = []
    for dialect in get_args(Dialect):
        speaks = Completions(model, dialect, codec, vocabulary)
        try:
            answer = await speaks.probe(server, "1+1=")
        except ServerError as error:
            # It may know neither the path nor the form; what fails for another reason fails.
            if not isinstance(error, NoCompletion) and error.status not in _UNKNOWN:
                raise
            refused.append(str(error))
            continue
        if answer.tokens is not None:
            _check_same_text(answer, codec)
            if parallel:
                await _check_tags(speaks, server)
        return speaks
    raise ServerError(refused[0])


def _check_same_text(answer: _Answer, codec: Codec) -> None:
    """Raises ServerError if the ids of an answer are another text here."""
    assert answer.tokens is not None
    tokens = [id for id in answer.tokens if id not in codec.end_ids]
    ours = codec.decode(tokens)
    # A server may leave out special tokens and what is no whole character yet.
    if _letters(ours) != _letters(answer.text) and "\ufffd" not in ours + answer.text:
        raise ServerError(
            f"server: its tokenizer is another than that of --model: the tokens {tokens} are "
            f"{answer.text[:80]!r} there and {ours[:80]!r} here"
        )


def _letters(text: str) -> str:
    return re.sub(r"<[^<>\s]*>|\s", "", text)


async def _check_tags(speaks: Completions, server: Connection) -> None:
    try:
        await speaks.probe(server, "<Parallel>\n<Outlines>")
    except ServerError as error:
        if error.status is None:
            raise
        raise ServerError(f"server: its model does not take the tags: {error}") from error
