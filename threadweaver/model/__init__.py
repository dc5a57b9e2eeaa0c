"""Hugging Face decoders on our kernels: load and save, attention over tries and pages, losses."""

from threadweaver.model.attention import (
    ATTENTION,
    PagedStep,
    kv_shape,
    paged_hidden_states,
    trie_hidden_states,
)
from threadweaver.model.context import context_length
from threadweaver.model.end_tokens import end_ids, end_ids_of
from threadweaver.model.fingerprint import weights_fingerprint
from threadweaver.model.fused import fuse, to_device
from threadweaver.model.load import load_configs, load_model, load_tokenizer
from threadweaver.model.logits import OutputLayer, mask_unknown_ids, output_layer
from threadweaver.model.loss import (
    TokenLogprobs,
    cross_entropy_sum,
    supervised_tokens,
    token_logprobs,
    trie_logprobs,
    trie_loss,
)
from threadweaver.model.new import new_model, parameter_count
from threadweaver.model.probe import probe
from threadweaver.model.save import save_model, save_without_weights
from threadweaver.model.supported import check_supported
from threadweaver.model.tokenizer import build_tokenizer
from threadweaver.model.vocabulary import add_tags, ids_end
from threadweaver.model.weight_copies import WeightCopies
from threadweaver.model.without_weights import model_without_weights, replace_parameters

__all__ = [
    "ATTENTION",
    "OutputLayer",
    "PagedStep",
    "TokenLogprobs",
    "WeightCopies",
    "add_tags",
    "build_tokenizer",
    "check_supported",
    "context_length",
    "cross_entropy_sum",
    "end_ids",
    "end_ids_of",
    "fuse",
    "ids_end",
    "kv_shape",
    "load_configs",
    "load_model",
    "load_tokenizer",
    "mask_unknown_ids",
    "model_without_weights",
    "new_model",
    "output_layer",
    "paged_hidden_states",
    "parameter_count",
    "probe",
    "replace_parameters",
    "save_model",
    "save_without_weights",
    "supervised_tokens",
    "to_device",
    "token_logprobs",
    "trie_hidden_states",
    "trie_logprobs",
    "trie_loss",
    "weights_fingerprint",
]
