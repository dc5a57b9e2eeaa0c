"""Text to token ids and back, for one tokenizer that knows the tags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from threadweaver.trajectory.ids import token_ids
from threadweaver.trajectory.prompt import (
    CONTROL,
    Piece,
    Prompt,
    PromptFormat,
    Rendered,
    TemplateConfig,
)
from threadweaver.trajectory.tags import BLOCK_TAGS, TAGS, THREAD_HEADER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORCED_HEADER = re.compile(f"(?<=<Thread>){THREAD_HEADER.pattern}")
_HEADER_SO_FAR = re.compile(r"\s*(?:[0-9]+(?:\.[0-9]+)*\.?\s*)?")
_MAX_HEADER_TOKENS = 32
_ROUND_TRIP = "1\n<Thread>\n1:1</Thread>\n"


class Vocabulary(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Codec:
    """Maps tags and text to ids.

    Attributes:
        tag_ids: tag -> id; at least the tags of a block.
        tags: id -> tag, the same pairs.
        eos_id: id that ends a response; the one that training appends.
        end_ids: all ids that end one, eos_id first, then ascending.
        newline_ids: ids of the newline that the state machine writes after a join; empty for a
            character vocabulary without a newline, and for a vocabulary without tags.
        prompts: the text of prompts.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tag_ids: Mapping[str, int],
        eos_id: int,
        newline_ids: Sequence[int],
        end_ids: Iterable[int] = (),
        prompts: PromptFormat | None = None,
    ):
        missing = [tag for tag in BLOCK_TAGS if tag not in tag_ids]
        if missing:
            raise ValueError(f"the vocabulary lacks the tags {', '.join(missing)}")
        self.tag_ids = dict(tag_ids)
        self.tags = {id: tag for tag, id in self.tag_ids.items()}
        (self.eos_id,) = token_ids([eos_id], "eos_id")
        others = set(token_ids(end_ids, "end_ids")) - {self.eos_id}
        self.end_ids = (self.eos_id, *sorted(others))
        self.newline_ids = tuple(token_ids(newline_ids, "newline_ids"))
        self.prompts = prompts or PromptFormat()
        self._vocabulary = vocabulary
        self._texts: dict[int, str] = {}

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Iterable[int] = (),
        template: TemplateConfig | None = None,
    ) -> Codec:
        """Codec of a Hugging Face tokenizer in which every tag is one token.

        Args:
            end_ids: that end a response besides its eos_token: `threadweaver.model.end_ids`.
            template: how prompts become text; default: by the tokenizer's chat template, if any.

        Raises:
            ValueError: a tag is missing or is split up, there is no end-of-sequence token,
                decoding does not give back the text, or the chat template fails.
        """
        missing = missing_tags(tokenizer)
        if missing:
            raise ValueError(
                f"the tokenizer has no single token for {', '.join(missing)}: "
                "python -m threadweaver.add_tags --model MODEL --out FOLDER adds them"
            )
        vocab = tokenizer.get_vocab()
        text = _TokenizerVocabulary(tokenizer)
        tag_ids = {tag: vocab[tag] for tag in TAGS}
        prompts = PromptFormat(_controls(tokenizer), tokenizer, template)
        codec = cls(text, tag_ids, _eos_id(tokenizer), text.encode("\n"), end_ids, prompts)
        decoded = codec.decode(codec.encode(_ROUND_TRIP))
        if decoded != _ROUND_TRIP:
            raise ValueError(
                f"the tokenizer decodes {_ROUND_TRIP!r} to {decoded!r}: it must keep every "
                "character (a byte-level tokenizer does)"
            )
        return codec

    @classmethod
    def without_tags(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Iterable[int] = (),
        template: TemplateConfig | None = None,
    ) -> Codec:
        """Codec of a Hugging Face tokenizer, for sequential mode alone: tags are mere text.

        The ids of tags are negative, so that no token is one, and there is no newline to write
        around threads.

        Raises:
            ValueError: there is no end-of-sequence token, or the chat template fails.
        """
        tag_ids = {tag: -1 - i for i, tag in enumerate(TAGS)}
        text = _TokenizerVocabulary(tokenizer)
        prompts = PromptFormat(_controls(tokenizer), tokenizer, template)
        return cls(text, tag_ids, _eos_id(tokenizer), (), end_ids, prompts)

    @classmethod
    def from_vocab(
        cls, vocab: Mapping[str, int], *, eos_id: int, end_ids: Iterable[int] = ()
    ) -> Codec:
        """Codec of a vocabulary of single characters, and tags or other special strings, by hand.

        Decoding an id that is not in the vocabulary gives U+FFFD.

        Raises:
            ValueError: a tag of a block is missing, or an id is no integer.
        """
        token_ids(vocab.values(), "vocab")
        tag_ids = {tag: vocab[tag] for tag in TAGS if tag in vocab}
        newline_ids = [vocab["\n"]] if "\n" in vocab else []
        return cls(_CharacterVocabulary(vocab), tag_ids, eos_id, newline_ids, end_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with thread headers as the state machine forces them.

        A header is encoded by itself, so that no token straddles its colon: training and decoding
        then see the same ids. No other tokens are added.
        """
        if self.tag_ids["<Thread>"] < 0:
            return self._vocabulary.encode(text)
        ends = [header.end() for header in _FORCED_HEADER.finditer(text)]
        pieces = [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]
        return [id for piece in pieces if piece for id in self._vocabulary.encode(piece)]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt. What a user wrote is text: where it names a control token or a tag, the
        name is encoded in parts, so that it is none.

        Raises:
            ValueError: the chat template refuses the prompt.
        """
        return self._encode_pieces(self.prompts.pieces(prompt))

    def check_markup(self, prompt: Prompt) -> None:
        """Raises ValueError for a rendered prompt with a control token that is none here: another
        model's template wrote it, and this model would read it letter by letter."""
        if not isinstance(prompt, Rendered):
            return
        for control in CONTROL.findall(prompt):
            if len(self._vocabulary.encode(control)) > 1:
                raise ValueError(
                    f"the prompt holds {control}, a control token of another model, which is mere "
                    "text to this one: give the row's question and response in fields of their own"
                )

    def encode_response(self, response: str) -> list[int]:
        """Ids of a response to train on, with one end token: the first that it ends in, or else
        eos_id. Other control tokens at its end, such as one that closes a chat turn, are left out.

        Raises:
            ValueError: a control token stands before the end; names it.
        """
        body, closing = self.prompts.split_end(response)
        if control := self.prompts.control_in(body):
            raise ValueError(
                f"the response holds the control token {control} before its end: a response is "
                "one turn alone"
            )
        ids = self.encode(body)
        ends = [id for id in self._vocabulary.encode(closing) if id in self.end_ids]
        # One that the vocabulary does not mark as a control token may end the body itself.
        if ends or not ids or ids[-1] not in self.end_ids:
            ids.append(ends[0] if ends else self.eos_id)
        return ids

    def _encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        ids = []
        for text, literal in pieces:
            if literal:
                # No token of the name is one of the whole: parted after its first character.
                ids += self._vocabulary.encode(text[0])
                ids += self._encode_pieces(self.prompts.literal(text[1:]))
            else:
                ids += self.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, tags and special tokens included."""
        return self._vocabulary.decode(token_ids(ids, "ids to decode"))

    def header_end(self, ids: Sequence[int], start: int, end: int) -> int:
        """The end of the header that begins at ids[start], right after <Thread>.

        The header is the shortest run of tokens that reads a number and a colon. Without a colon
        (malformed) it is the longest run that could still become one, of at most 32 tokens, so that
        a thread of digits alone does not take quadratic time.
        """
        text = ""
        end = min(end, start + _MAX_HEADER_TOKENS)
        for i in range(start, end):
            text += self._text(ids[i])
            if THREAD_HEADER.match(text):
                return i + 1
            if not _HEADER_SO_FAR.fullmatch(text):
                return i
        return end

    def _text(self, id: int) -> str:
        if id not in self._texts:
            self._texts[id] = self._vocabulary.decode([id])
        return self._texts[id]


def missing_tags(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tags that are not one token wherever they stand in a text."""
    vocab = tokenizer.get_vocab()
    return [
        tag
        for tag in TAGS
        if tag not in vocab
        or vocab[tag] not in tokenizer.encode(f"1{tag}1", add_special_tokens=False)
    ]


def _controls(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens and tags, as they are written."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    return {*special, *map(str, tokenizer.all_special_tokens), *TAGS}


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no eos_token: set it to the token that ends a turn")
    return tokenizer.eos_token_id


class _TokenizerVocabulary:
    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except TypeError as error:
            raise ValueError("the text holds half of a surrogate pair, which is no text") from error

    def decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list comes back only for a batch
        return text


class _CharacterVocabulary:
    def __init__(self, vocab: Mapping[str, int]):
        self._ids = dict(vocab)
        self._texts = {id: text for text, id in vocab.items()}
        longest_first = sorted(vocab, key=len, reverse=True)
        self._symbol = re.compile("|".join(map(re.escape, longest_first)))

    def encode(self, text: str) -> list[int]:
        ids, end = [], 0
        for symbol in self._symbol.finditer(text):
            if symbol.start() > end:
                break
            ids.append(self._ids[symbol[0]])
            end = symbol.end()
        if end < len(text):
            raise ValueError(f"the vocabulary lacks {text[end]!r}, character {end} of the text")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts.get(id, "\ufffd") for id in ids)
