"""LoRA adapters of a model (arXiv 2106.09685), by peft, and models without them again.

Adapters are put into the model in place: it stays one of transformers, whose linear layers are
those of peft. Beside them the rows of the tags are trained (trained_rows.py). A folder of adapters
is peft's: adapter_config.json, adapter_model.safetensors.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from threadweaver.model.files import reading
from threadweaver.model.trained_rows import drop_rows, put_into_tables, tables_alone, train_rows

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's, of the one adapter there is


def why_no_lora() -> str | None:
    """What is missing, in a clause; None: nothing."""
    if importlib.util.find_spec("peft") is None:
        return "it needs the package 'peft': pip install 'threadweaver[lora]'"
    return None


class Adapters:
    """Adapters that a model has from now on, with all else of it frozen.

    Args:
        rank, alpha: alpha / rank times a product of this rank is added to a matrix.
        targets: names of linear layers, or the end of their names; or all-linear: all but the
            output layer, and but those that peft tells by the same names as experts.
        trained_ids: tokens whose rows in the tables are trained too.
        seed: of the first of the two matrices; the second is zero.

    Attributes:
        model: the model.

    Raises:
        ValueError: targets that are no linear layers of this model; begins with "targets".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rank: int,
        alpha: float,
        targets: Sequence[str] | str,
        trained_ids: Sequence[int],
        seed: int,
    ):
        from peft import LoraConfig, inject_adapter_in_model

        self.model = model
        targets = [targets] if isinstance(targets, str) else targets
        self._config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (any number is taken)
            target_modules=_target_names(model, targets),
            task_type="CAUSAL_LM",
        )
        _leave_out_experts(self._config, model, ALL_LINEAR in targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self._config, model, adapter_name=_NAME)
        for layer in adapted_layers(model).values():
            # Products cast their operands themselves, by autocast.
            layer.cast_input_dtype_enabled = False
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        train_rows(model, trained_ids)
        self._trained_ids = sorted(trained_ids)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, float32."""
        return adapter_parameters(self.model)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is what it was without adapters."""
        with ExitStack() as stack:
            stack.enter_context(tables_alone(self.model))
            layers = adapted_layers(self.model).values()
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)

    def save(self, folder: Path, base: str) -> None:
        """Writes them as peft does, for PeftModel.from_pretrained.

        Args:
            base: folder of the model that they are for.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._config)
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules or [])  # peft keeps a set
        config.trainable_token_indices = {
            name.rpartition(".")[0]: self._trained_ids
            for name, _ in self.model.named_parameters()
            if name.endswith(".trained_rows")
        }
        config.save_pretrained(str(folder))
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._stored().items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Raises ValueError, naming the file, if it does not hold the adapters of this model."""
        path = folder / WEIGHTS_FILE
        with reading(path):
            stored, ours = load_file(path), self._stored()
            for name in sorted(stored.keys() | ours.keys()):
                shapes = [list(t[name].shape) if name in t else None for t in (stored, ours)]
                if shapes[0] != shapes[1]:
                    raise ValueError(
                        f"made for another model: {name} has shape {shapes[0]} there and "
                        f"{shapes[1]} in the model"
                    )
            for name, parameter in ours.items():
                parameter.copy_(stored[name])

    def _stored(self) -> dict[str, nn.Parameter]:
        """Parameters by the names that peft stores them under."""
        stored = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                name = name.replace(f".{_NAME}.", ".")
                name = name.replace(".trained_rows", ".token_adapter.trainable_tokens_delta")
                stored[f"base_model.model.{name}"] = parameter
        return stored


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of a model with adapters: the adapters and the rows of tags, float32."""
    return [p for p in model.parameters() if p.requires_grad]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name: peft's, around the linear layers of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@torch.no_grad()
def merged_weight(layer: Any, weight: Tensor | None = None) -> Tensor:
    """weight + alpha / rank B A of a layer of `adapted_layers`, float32.

    Args:
        weight: whole, if that of the layer is divided among processes.
    """
    of_base: Tensor = layer.base_layer.weight if weight is None else weight
    with torch.autocast(of_base.device.type, enabled=False):
        return of_base.float() + layer.get_delta_weight(_NAME).float()


def unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """The same model of its own modules without adapters, which shares all parameters."""
    shared = [*model.parameters(), *model.buffers(), model.config]
    plain = copy.deepcopy(model, {id(x): x for x in shared})
    for name, layer in adapted_layers(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.base_layer)
    return plain


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """What the adapters are for, on the parameters of the model."""
    plain = unwrap(model)
    drop_rows(plain)
    return plain


def merged_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters merged into weights of the same dtype, on the CPU; shares the
    weights that have none."""
    plain = unwrap(model)
    for name, layer in adapted_layers(model).items():
        weight = layer.base_layer.weight
        merged = merged_weight(layer).to(weight.dtype).cpu()
        plain.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
    put_into_tables(plain)
    return plain


def _target_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Of all linear layers that are meant, as peft tells them.

    Raises:
        ValueError: one of the targets is none; says which there are.
    """
    head, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D)
    linear = [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]
    if ALL_LINEAR in targets:
        return linear
    names: list[str] = []
    for target in targets:
        found = [n for n in linear if n == target or n.endswith(f".{target}")]
        if not found:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"targets: {target!r} names no linear layer that can have an adapter; there are: "
                f"{ends}"
            )
        names += found
    return sorted(set(names))


def _leave_out_experts(config: Any, model: PreTrainedModel, quietly: bool) -> None:
    """Experts of transformers 5 are parameters of three dimensions, no layers. Where a model has
    some, peft takes the names that their layers had, wherever they stand, for these parameters.

    Raises:
        ValueError: such names were asked for, and this is not to be done quietly.
    """
    from peft.utils import transformers_weight_conversion as conversion

    converted = copy.deepcopy(config)
    conversion.convert_peft_config_for_transformers(converted, model, None)
    lost = sorted(set(config.target_modules) - set(converted.target_modules))
    if lost and not quietly:
        raise ValueError(
            f"targets: {lost[0].rpartition('.')[2]!r} is what peft calls experts' parameters in "
            f"{model.config.model_type}, which get no adapters here: leave it out"
        )
    config.target_modules = set(converted.target_modules)
