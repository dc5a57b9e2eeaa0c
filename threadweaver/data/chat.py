"""Chat templates: prompts as the user's turn, and texts split where the assistant's turn begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (header before the assistant's turn, text that closes it) of the chat templates that `qwen_text`
# is found in: Qwen, Llama 3, DeepSeek.
CHAT_TURNS = (
    ("<|im_start|>assistant\n", "<|im_end|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001 (that template's own characters)
)


def split_chat(text: str) -> tuple[str, str] | None:
    """Prompt and response of a chat: all up to and including the header of the last assistant's
    turn, and the rest without the token that closes it; None if no known template is found."""
    for header, end in CHAT_TURNS:
        before, found, response = text.rpartition(header)
        if found:
            closed = response.rstrip()
            return before + header, closed.removesuffix(end) if closed.endswith(end) else response
    return None


def qwen_prompt(messages: Sequence[dict[str, str]]) -> str:
    """Messages {"role", "content"} in Qwen's chat template, up to where the answer begins."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + CHAT_TURNS[0][0]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the user's turn of the tokenizer's chat template, up to where the answer begins.

    Raises:
        ValueError: the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat: the tokenizer has no chat template; leave the option out")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # not tokenized
    return text
