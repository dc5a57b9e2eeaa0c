"""What a run starts from: torch's own settings, the model, the optimizer, the problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.data import Example, load_examples
from threadweaver.eval import ground_truth
from threadweaver.model import load_model, new_model
from threadweaver.tasks.multiplication import is_correct
from threadweaver.tokenizer import build_tokenizer
from threadweaver.train.config import ConfigError, SFTConfig
from threadweaver.trajectory import add_tags


def prepare_torch(config: SFTConfig, state: dict[str, Any] | None) -> torch.device:
    """Sets threads, seed and determinism; returns the device."""
    compute = config.compute
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device: no CUDA device here; use cpu or auto")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if compute.device == "auto" else compute.device)
    # The number of threads decides in which order sums are taken.
    threads = compute.threads or (state["threads"] if state else None)
    if threads:
        torch.set_num_threads(threads)
    # On the CPU only: without it a gradient that many rows add to is summed in any order.
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (set by a property of the module)
    torch.manual_seed(config.seed)
    return device


def build_model(
    config: SFTConfig, checkpoint: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, in float32 on the CPU: of a checkpoint if given, else of the settings.

    Raises:
        ValueError: there is none, it is damaged, or it cannot be trained on tries.
    """
    path = checkpoint or config.model.path
    if path is None:
        tokenizer = build_tokenizer()
        return new_model(tokenizer, config.model.arch or {}, config.seed), tokenizer
    try:
        model, tokenizer = load_model(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _misfit(Path(path)) or " ".join(str(error).split())[:300]
        raise ConfigError(f"model.path: {path} cannot be loaded: {reason}") from error
    add_tags(tokenizer, model)
    # A matrix product may round by where its operands lie. Loaded weights lie as they do in the
    # file; copies lie as in a model that was never saved.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, tokenizer


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


def build_optimizer(model: PreTrainedModel, config: SFTConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors (norms, biases). The rate is set step by step."""
    settings = config.optimization
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def load_problems(config: SFTConfig) -> list[Example]:
    """The problems of the final evaluation, none if there is to be none.

    Raises:
        ValueError: one has no ground truth, or one that answers cannot be compared with.
    """
    if config.evaluate.data is None:
        return []
    problems = load_examples(config.evaluate.data)[: config.evaluate.problems]
    for problem in problems:
        try:
            is_correct("</think>\\boxed{0}", ground_truth(problem))
        except ValueError as error:
            raise ConfigError(f"evaluate.data: {problem.source}: {error}") from error
    return problems
