"""A small fixed tokenizer for training from scratch: 320 tokens, nothing learned from data.

256 bytes (so any text round-trips), the tags of a trajectory and `<|pad|>`, `<|endoftext|>` as
special tokens, and the few words of the built-in tasks as one token each. A digit is always a token
of its own, so is a newline and a colon: the text the state machine forces (a newline, a thread tag,
a number and a colon) therefore has the same tokens wherever it stands.

`encode` adds no tokens of its own: callers that want the end token append
`tokenizer.eos_token_id`.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from threadweaver.trajectory import TAGS

EOS = "<|endoftext|>"
PAD = "<|pad|>"
# None holds a digit, a newline or a colon: those stay single tokens in every context.
WORDS = (
    ", ",
    "\\boxed{",
    "times ",
    "carry ",
    " so ",
    "ones ",
    "tens ",
    "hundreds ",
    "thousands ",
    "ten-thousands ",
    "hundred-thousands ",
    "millions ",
    "ten-millions ",
    "hundred-millions ",
    "billions ",
)
VOCAB_SIZE = 320


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same on every call: 320 tokens, ids 0 to 319, a multiple of 64.

    `decode(encode(text)) == text` for any text that UTF-8 can hold. A tag or end token written out
    in the text becomes that token. `save_pretrained(folder)` writes a normal Hugging Face
    tokenizer, read back by `AutoTokenizer.from_pretrained(folder)`.
    """
    special = [PAD, EOS, *TAGS]
    plain = [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    special += [f"<|reserved-{i}|>" for i in range(VOCAB_SIZE - len(special) - len(plain))]
    # Every token is in the model's own vocabulary, so `vocab_size` and `len` agree. Those longer
    # than a byte are found in the text because they are added tokens too.
    core = Tokenizer(models.BPE({text: i for i, text in enumerate(special + plain)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    core.add_tokens([AddedToken(text, normalized=False) for text in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
