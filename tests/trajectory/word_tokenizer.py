"""A tokenizer that decodes as those made by SentencePiece do (Llama 2, TinyLlama, Mistral)."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(gap: int = 0) -> PreTrainedTokenizerFast:
    """Words with the space before them, and bytes. The space before a whole text is left out.

    Args:
        gap: ids that no token has, before that of the last.
    """
    words = ["▁a", "▁big", "▁world", "▁", ".", "</s>"]
    names = ["<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {name: id for id, name in enumerate(names)} | {"▁late": len(names) + gap}
    bpe = models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
