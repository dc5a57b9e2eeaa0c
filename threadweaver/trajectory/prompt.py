"""What a prompt is, and the text that a model sees of it: the tokenizer's own chat template
(docs/semantics.md, "Prompts and answers")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from threadweaver.trajectory.tags import TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Think step by step, and put the final answer in \\boxed{}."
# How most vocabularies write their control tokens. No response holds one before its end, whether
# or not the tokenizer at hand knows it.
CONTROL = re.compile(r"<[|｜][A-Za-z][\w▁.-]{2,}[|｜]>")  # noqa: RUF001 (characters of DeepSeek's)
_OPEN_THINK = re.compile(r"<think>\s*\Z")

Message = dict[str, str]


class Rendered(str):
    """Text that a template was applied to: taken as it stands, control tokens included."""

    __slots__ = ()


# A str is a question, the user's turn; a list holds messages {"role", "content"}.
Prompt = str | list[Message]


@dataclass(frozen=True)
class TemplateConfig:
    """How a prompt becomes the text that the model sees.

    Args:
        use: auto: by the tokenizer's own chat template, if it has one; none: a prompt is taken as
            it stands, control tokens in it included.
        system: the system's turn of prompts that have none; needs a template.
        instruction: stands below the question in the user's turn; '' for none. Default, with a
            template and a question that speaks of no \\boxed: think step by step, put the final
            answer in \\boxed{}.
        kwargs: passed on to the template, such as '{enable_thinking: false}'.
    """

    use: Literal["auto", "none"] = "auto"
    system: str | None = None
    instruction: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a prompt's text; of a literal one no token is a control token or a tag."""

    text: str
    literal: bool = False


class PromptFormat:
    """The text of prompts, for one tokenizer.

    Attributes:
        header: what the template writes before the assistant's turn; '' without a template.
        start: what the tokenizer itself puts before any text, such as its BOS token; '' for many.
    """

    def __init__(
        self,
        controls: Iterable[str] = TAGS,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: TemplateConfig | None = None,
    ):
        """
        Args:
            controls: control tokens and tags, as they are written.
            tokenizer: whose template is used, if it has one and the config says so.

        Raises:
            ValueError: a setting needs a template and there is none, or the template fails.
        """
        self._config = config = config or TemplateConfig()
        self._controls = _any_of(controls)
        self._not_tags = _any_of(set(controls) - set(TAGS))
        has_template = tokenizer is not None and bool(tokenizer.chat_template)
        self._tokenizer = tokenizer if has_template and config.use == "auto" else None
        self.header, self.start = "", "" if tokenizer is None else _start_of(tokenizer)
        if self._tokenizer is not None:
            turn = self._messages("question")
            whole, without = self._apply(turn), self._apply(turn, add_generation_prompt=False)
            if whole.startswith(without):
                self.header = whole[len(without) :]
            return
        for name in ("system", "instruction", "kwargs"):
            if getattr(config, name):
                reason = "use is none" if has_template else "the tokenizer has no chat template"
                raise ValueError(f"template.{name}: {reason}; leave it out")

    def text(self, prompt: Prompt) -> str:
        """Raises ValueError for a prompt that the template refuses."""
        return "".join(piece.text for piece in self.pieces(prompt))

    def pieces(self, prompt: Prompt) -> list[Piece]:
        """The text in pieces. What stands in a turn is literal, but for tags in the assistant's.

        Raises:
            ValueError: the template refuses the prompt; says why.
        """
        if self._tokenizer is None:
            return self._plain(prompt)
        if isinstance(prompt, Rendered):
            return [Piece(prompt)]
        marks: dict[str, str] = {}
        messages = self._messages(prompt)
        contents = "".join(message["content"] for message in messages)
        name = next(n for n in range(len(contents) + 2) if f"\ue000{n}." not in contents)

        def mark(found: re.Match[str]) -> str:
            # A mark in its place, which no template can take for a control token.
            return marks.setdefault(found[0], f"\ue000{name}.{len(marks)}\ue001")

        marked = []
        for message in messages:
            pattern = self._not_tags if message["role"] == "assistant" else self._controls
            marked.append({**message, "content": pattern.sub(mark, message["content"])})
        text = self._apply(marked)
        if not marks:
            return [Piece(text)]
        if any(mark not in text for mark in marks.values()):
            named = ", ".join(marks)
            raise ValueError(
                f"the prompt names {named}, and the tokenizer's chat template does not pass its "
                "text on as it is: take that out of the prompt"
            )
        controls = {mark: control for control, mark in marks.items()}
        parts = re.split(f"({_any_of(marks.values()).pattern})", text)
        return [
            Piece(controls[part], True) if part in controls else Piece(part)
            for part in parts
            if part
        ]

    def literal(self, text: str) -> list[Piece]:
        """Text in pieces, control tokens and tags in it apart."""
        parts = re.split(f"({self._controls.pattern})", text)
        return [Piece(part, i % 2 == 1) for i, part in enumerate(parts) if part]

    def after(self, prompt: Prompt, response: str) -> str:
        """A response to train on, without a <think> that the prompt's text has opened already."""
        text, rest = self.text(prompt), response.lstrip()
        if not rest.startswith("<think>") or not _OPEN_THINK.search(text):
            return response
        rest = rest.removeprefix("<think>")
        return rest.lstrip("\n") if text.endswith("\n") else rest

    def control_in(self, response: str) -> str | None:
        """The first control token, tags apart, that stands in a text; None: there is none."""
        found = self._not_tags.search(response) or CONTROL.search(response)
        return found[0] if found else None

    def split_end(self, response: str) -> tuple[str, str]:
        """A response, and the control tokens, with the white space among them, that end it."""
        closing = re.search(rf"(?:(?:{self._not_tags.pattern}|{CONTROL.pattern})\s*)+\Z", response)
        at = closing.start() if closing else len(response)
        return response[:at], response[at:]

    def _plain(self, prompt: Prompt) -> list[Piece]:
        if not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt)
        if self._config.use == "none":
            return [Piece(prompt)]
        # Apart, as the tokenizer itself has it: what follows is encoded as a beginning of text.
        start = [Piece(self.start)] if self.start else []
        text = prompt.removeprefix(self.start)
        if isinstance(prompt, Rendered):
            return [*start, Piece(text)]
        # Without turns a prompt may itself open the thinking, as generation prompts do.
        opened = _OPEN_THINK.search(text)
        at = opened.start() if opened else len(text)
        return [*start, *self.literal(text[:at]), *([Piece(text[at:])] if opened else [])]

    def _messages(self, prompt: Prompt) -> list[Message]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if turns:
            last = messages[turns[-1]]
            instruction = self._config.instruction
            if instruction is None and "\\boxed" not in "".join(m["content"] for m in messages):
                instruction = INSTRUCTION
            if instruction:
                content = f"{last['content'].rstrip()}\n{instruction}"
                messages[turns[-1]] = {**last, "content": content}
        if self._config.system and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self._config.system})
        return messages

    def _apply(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        assert self._tokenizer is not None
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                **{
                    **self._config.kwargs,
                    "tokenize": False,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except Exception as error:  # whatever a template's own code does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"the tokenizer's chat template refuses this prompt: {reason}"
            ) from error
        assert isinstance(text, str)  # not tokenized
        return text


def _start_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer puts before a text of its own accord."""
    text = "a"
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    places = range(len(whole) - len(plain) + 1)
    at = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
    start = tokenizer.decode(whole[:at], clean_up_tokenization_spaces=False)
    assert isinstance(start, str)  # a list comes back only for a batch
    return start


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds each of the texts, the longest where several begin; nothing for none."""
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
