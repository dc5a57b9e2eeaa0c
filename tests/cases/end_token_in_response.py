"""Rows whose response already ends with the end token, or with the token that closes a chat turn:
one end token carries loss, the last of the text, and no other control token comes before it."""

import sys
import tempfile
from itertools import product
from pathlib import Path

from threadweaver.data import load_examples, save_rows
from threadweaver.model import build_tokenizer
from threadweaver.model.tokenizer import EOS
from threadweaver.train.batches import build_tries
from threadweaver.train.config import DataConfig
from threadweaver.trajectory import Codec

R = "<think>\na\n</think>\n\\boxed{7}"
CHAT = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
CONTROLS = ["<|im_start|>", "<|im_end|>"]
USER = [{"role": "user", "content": "1?"}]
ROWS = {
    "response": {"question": "1?\n", "response": R},
    "response + end token": {"question": "1?\n", "response": R + EOS},
    "response + end token + newline": {"question": "1?\n", "response": R + EOS + "\n"},
    "response + two end tokens": {"question": "1?\n", "response": R + EOS + EOS},
    "response + newline + end token": {"question": "1?\n", "response": R + "\n" + EOS},
    "qwen_text + end token": {"question": "1?\n", "qwen_text": "1?\n" + R + EOS},
    "qwen_text, chat, closed": {"question": "1?", "qwen_text": f"{CHAT}{R}<|im_end|>\n"},
    "qwen_text, chat, closed twice": {"question": "1?", "qwen_text": f"{CHAT}{R}<|im_end|>{EOS}"},
    "response, chat, closed": {"prompt": USER, "response": R + "<|im_end|>"},
    "response, chat, closed, newline": {"prompt": USER, "response": R + "<|im_end|>\n"},
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fault() -> str | None:
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    for template, controls in product((None, TEMPLATE), ([], CONTROLS)):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(controls, special_tokens=True)
        tokenizer.chat_template = template
        codec = Codec.from_tokenizer(tokenizer)
        for name, row in ROWS.items():
            if row.get("qwen_text", "").startswith(CHAT) and not controls:
                continue  # of another model, and refused
            save_rows([row], path)
            examples = load_examples(path, codec=codec)
            (trie,) = build_tries(examples, codec, DataConfig(train=str(path)), 4096).tries
            with_loss = trie.tokens[trie.columns["weights"] > 0].tolist()
            # White space before the end token is the response's own.
            expected = f"{R}\n{EOS}" if "newline + end" in name else R + EOS
            if (text := codec.decode(with_loss)) != expected:
                return f"{name}, template {bool(template)}: trains on {text!r}"
    return None


if __name__ == "__main__":
    sys.exit(fault())
