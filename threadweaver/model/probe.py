"""Whether a model, once loaded, computes over a trie what it computes over ordinary sequences.

A decoder of `transformers` runs here if its layers call the attention registered under its name and
do nothing else that mixes tokens. Nothing in a config says so; the probe finds out. It runs a small
trie of two branches through the trainer's path and the engine's, and each branch as an ordinary
sequence through the model's own eager attention, and compares log-probabilities.

It looks at the architecture, not at the weights: for its length every parameter is replaced by
random values in float32, drawn so that no part of a layer is without effect (a fresh model's zeros
and small weights, or a rounding to bfloat16, would hide mistakes). Parameters that differ in a
layer's number alone share their values, so the probe takes the memory of one layer, the embedding
and the output layer. Windows are shortened so that a path is longer than they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from threadweaver.model.attention import (
    NoTrie,
    PagedStep,
    attend,
    kv_shape,
    paged_hidden_states,
)
from threadweaver.model.logits import output_layer
from threadweaver.model.loss import trie_logprobs
from tw_kernels import DecodePlan, PagedKV, Trie

# Nats. Rounding leaves up to 1.1e-5 in the families of transformers 5.17 that run, and 1e-5 in a
# model of 36 layers and 1.3 B parameters. The least that a layer can leave out, Gemma 2's soft cap
# of 50, is 3e-3; sinks are 8e-2, a window 2 (tests/model/test_probe.py).
TOLERANCE = 3e-4
_PAGE = 4  # tokens a KV page
_TRUNK, _BRANCH = 2 * _PAGE, 6  # tokens of the trie's trunk, and of each branch
_WINDOW = 5  # shorter than a path
_IDS = 2**15  # the first that are looked at
_RECORDED = "trie-recorded"
_BLOCK = 2**20 - 3  # random numbers a parameter is tiled from; odd, so that rows differ


def probe(model: PreTrainedModel) -> None:
    """Raises ValueError, with the family's name and the reason, unless the model computes the same
    over tries and pages as over ordinary sequences. Leaves the model as it was."""
    with (
        torch.no_grad(),
        _evaluating(model),
        _short_windows(model),
        _random_parameters(model),
        _recording(model) as keys,
    ):
        try:
            reason = _why_not(model, keys)
        except NoTrie:
            reason = "their layers do not hand the arguments of a call down to their attention"
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not isinstance(error, ValueError):
                reason = f"{type(error).__name__}: {reason}"
    if reason is not None:
        raise ValueError(f"{model.config.model_type} models are not supported: {reason}")


@torch.no_grad()
def trie_outputs(model: PreTrainedModel) -> Tensor:
    """Log-probabilities of a small trie under the probe's parameters, [paths, tokens - 1]: what a
    change of the model must not change. Leaves the model as it was."""
    with _evaluating(model), _short_windows(model), _random_parameters(model):
        return _on_trie(model, _paths(model))


def _why_not(model: PreTrainedModel, keys: list[tuple[int, torch.Size]]) -> str | None:
    """`keys`: layer and shape of the keys of each call of attention so far."""
    paths = _paths(model)
    over_trie = _on_trie(model, paths)
    layers = model.config.get_text_config().num_hidden_layers
    if not keys:
        return "their layers do not take an attention function"
    if sorted(layer for layer, _ in keys) != list(range(layers)):
        return (
            f"attention ran {len(keys)} times, and not once in each of their {layers} layers: "
            "tokens must mix in no other way"
        )
    if len({shape for _, shape in keys}) > 1:
        return "their layers have keys of different sizes"
    _, heads, _, head_dim = keys[0][1]
    if (heads, head_dim) != kv_shape(model, 1, 1)[-2:]:
        return f"their layers have {heads} KV heads of {head_dim}, unlike their config"
    on_pages = _on_pages(model, paths)
    with _implementation(model, "eager"):
        want = _alone(model, paths)
    for where, got in (("over a trie", over_trie), ("while decoding", on_pages)):
        worst = (got - want).abs().max().item()
        if not worst <= TOLERANCE:
            return f"{where} log-probabilities differ from the model's own by {worst:.2g} nats"
    return None


def _paths(model: PreTrainedModel) -> list[list[int]]:
    """Two paths with a common trunk, of ids that have a token and mean nothing special."""
    config, head = model.config, output_layer(model)
    special = set()
    for source in (config.to_dict(), config.get_text_config().to_dict()):
        for name, value in source.items():
            if name.endswith(("_id", "_ids", "_index")):
                special |= set(value if isinstance(value, list) else [value])
    known = torch.ones(head.rows or len(head.weight), dtype=torch.bool)
    if head.unknown is not None:
        known &= ~head.unknown.cpu()
    plain = [id for id in known.nonzero()[:_IDS, 0].tolist() if id not in special]
    num_ids = _TRUNK + 2 * _BRANCH
    step = max(1, len(plain) // num_ids)
    ids = [plain[i * step % len(plain)] for i in range(num_ids)]
    trunk, end = ids[:_TRUNK], _TRUNK + _BRANCH
    return [trunk + ids[_TRUNK:end], trunk + ids[end:]]


def _on_trie(model: PreTrainedModel, paths: list[list[int]]) -> Tensor:
    """Log-probabilities of all tokens but the first, [paths, tokens - 1], as in training."""
    trie = Trie.from_paths(paths)
    nodes = torch.stack([torch.as_tensor(trie.path_nodes(i))[1:] for i in range(len(paths))])
    layout = trie.layout(model.device)
    return trie_logprobs(model, trie, layout, nodes.flatten()).logprobs.view(nodes.shape)


def _on_pages(model: PreTrainedModel, paths: list[list[int]]) -> Tensor:
    """The same as an engine computes them: a prefill of one path, then a step in which it decodes a
    token and the other is prefilled on the pages of the trunk."""
    first, second = (path[:-1] for path in paths)
    length, trunk = len(first), _TRUNK // _PAGE
    pages = -(-length // _PAGE)
    tables = [list(range(pages)), [*range(trunk), *range(pages, 2 * pages - trunk)]]
    memory = torch.empty(kv_shape(model, 2 * pages, _PAGE), dtype=model.dtype, device=model.device)
    caches = [PagedKV(k, v) for k, v in memory]
    head = output_layer(model)

    def logits(tables: list[list[int]], lengths: list[int], new: list[tuple[list[int], int]]):
        """Of the ids from the position given with them on."""
        counts = [len(ids) for ids, _ in new]
        plan = DecodePlan.build(tables, lengths, counts, _PAGE, model.device)
        ids = torch.tensor([id for part, _ in new for id in part], device=model.device)
        at = [start + i for part, start in new for i in range(len(part))]
        positions = torch.tensor(at, device=model.device)
        hidden = paged_hidden_states(model, ids, positions, PagedStep(caches, plan))
        return head(hidden).split(counts)

    (prefill,) = logits(tables[:1], [length - 1], [(first[:-1], 0)])
    step, other = logits(
        tables, [length] * 2, [(first[-1:], length - 1), (second[_TRUNK:], _TRUNK)]
    )
    whole = torch.stack([torch.cat([prefill, step]), torch.cat([prefill[:_TRUNK], other])])
    return _next(whole, paths)


def _alone(model: PreTrainedModel, paths: list[list[int]]) -> Tensor:
    """The same by the model itself, each path an ordinary sequence."""
    ids = torch.tensor(paths, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    head = output_layer(model)
    logits = logits[..., : head.rows]
    if head.unknown is not None:
        logits = logits.masked_fill(head.unknown, torch.finfo(logits.dtype).min)
    return _next(logits[:, :-1], paths)


def _next(logits: Tensor, paths: list[list[int]]) -> Tensor:
    """Log-probabilities of the ids that follow; logits [paths, tokens - 1, V]."""
    ids = torch.tensor(paths, device=logits.device)[:, 1:, None]
    return logits.float().log_softmax(-1).gather(-1, ids).squeeze(-1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _set(values: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes (object, name, value), and back at the end."""
    before = [(object, name, getattr(object, name)) for object, name, _ in values]
    try:
        for object, name, value in values:
            setattr(object, name, value)
        yield
    finally:
        for object, name, value in reversed(before):
            setattr(object, name, value)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """All that its modules read."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in configs if isinstance(c, PretrainedConfig)}.values())


def _implementation(model: PreTrainedModel, name: str):
    """Runs the model with the attention of this name."""
    # set_attn_implementation also looks for packages, and cannot be undone for every sub-model.
    return _set([(c, "_attn_implementation_internal", name) for c in _configs(model)])


def _short_windows(model: PreTrainedModel):
    """Windows shorter than the paths, in the model's configs and layers alike."""
    found = []
    for holder in (*_configs(model), *model.modules()):
        window = getattr(holder, "sliding_window", None)
        if isinstance(window, int) and not isinstance(window, bool) and window > _WINDOW:
            found.append((holder, "sliding_window", _WINDOW))
    return _set(found)


@contextmanager
def _recording(model: PreTrainedModel) -> Iterator[list[tuple[int, torch.Size]]]:
    """Layer and shape of the keys [1, Hkv, N, D] of each call of attention."""
    calls: list[tuple[int, torch.Size]] = []

    def recorded(module, query, key, *args, **kwargs):
        calls.append((module.layer_idx, key.shape))
        return attend(module, query, key, *args, **kwargs)

    AttentionInterface.register(_RECORDED, recorded)
    try:
        with _implementation(model, _RECORDED):
            yield calls
    finally:
        AttentionInterface._global_mapping.pop(_RECORDED)


@contextmanager
def _random_parameters(model: nn.Module) -> Iterator[None]:
    """Random values in float32 for all parameters, the same for all layers; buffers in float32."""
    values: dict[tuple[str, torch.Size], nn.Parameter] = {}
    drawn: dict[int, nn.Parameter] = {}  # by the parameter that it stands for, which may be tied
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules(remove_duplicate=True):
            for name, old in module._parameters.items():
                if old is None:
                    continue
                key = ".".join(p for p in path.split(".") if not p.isdigit()) + "." + name
                if id(old) not in drawn:
                    if (key, old.shape) not in values:
                        values[key, old.shape] = _random(key, old)
                    drawn[id(old)] = values[key, old.shape]
                swapped.append((module._parameters, name, old))
                module._parameters[name] = drawn[id(old)]
            for name, old in module._buffers.items():
                if old is not None and old.is_floating_point() and old.dtype != torch.float32:
                    swapped.append((module._buffers, name, old))
                    module._buffers[name] = old.float()
        yield
    finally:
        for holder, name, old in swapped:
            holder[name] = old


def _random(key: str, like: Tensor) -> nn.Parameter:
    """Matrices keep the size of what they multiply, vectors are around 1 (norms, biases)."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    block = torch.rand(min(like.numel(), _BLOCK), generator=generator) * 2 - 1
    if like.dim() < 2:
        block = 1 + block / 2
    else:
        block *= 2 * like.shape[-1] ** -0.5
    tiled = block.repeat(-(-like.numel() // max(1, len(block))))[: like.numel()]
    return nn.Parameter(tiled.view(like.shape).to(like.device), requires_grad=False)
