"""LoRA: adapters put into a model, told apart from it, switched off, and merged into plain weights.

Adapters are trained in float32 and kept in PEFT's format; everything works on tensors by name, so that it does not
matter which engine holds them.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_cache.config import LoraOptions
from opd_cache.errors import ConfigError
from opd_cache.models import ADAPTER_CONFIG, LanguageModel
from opd_cache.store.disk import write_whole
from opd_cache.tensor_files import FORMAT, read_tensors, save_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"  # PEFT's name of the only one
_PREFIX = "base_model.model."  # of every name in a PEFT file


def add_adapters(model: LanguageModel, options: LoraOptions) -> None:
    """Put fresh adapters, which change nothing yet, into a model; only they are trained. Raises ConfigError."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "learn.lora.rank is set, but peft is not installed. Run: pip install 'opd-cache[lora]'"
        ) from error
    config = LoraConfig(
        r=options.rank or 0,
        lora_alpha=options.alpha,
        target_modules=options.target_modules or _linear_layers(model),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            inject_adapter_in_model(config, model.module)
        except ValueError as error:
            raise ConfigError(f"learn.lora.target_modules = {options.target_modules}: {error}") from error
    for name, parameter in model.module.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def _linear_layers(model: LanguageModel) -> list[str]:
    return sorted(
        name for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear) and layer is not model.head
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter's."""
    return f".{ADAPTER}." in name and ".lora_" in name


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The model as it was before the adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(state: Mapping[str, Tensor], options: LoraOptions) -> dict[str, Tensor]:
    """Plain weights by their plain names: W + alpha / rank · B A."""
    scale = options.alpha / (options.rank or 1)
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer, is_adapted, kind = name.partition(".base_layer.")
        if is_adapted and kind == "weight":
            down, up = (state[f"{layer}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
            tensor = (tensor.float() + scale * (up @ down)).to(tensor.dtype)
        plain[f"{layer}.{kind}" if is_adapted else name] = tensor
    return plain


def save_adapters(folder: Path, state: Mapping[str, Tensor], module: nn.Module, base: str) -> None:
    """Write the adapters in PEFT's format, for a base model."""
    folder.mkdir(exist_ok=True)
    tensors = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.contiguous()
        for name, tensor in state.items()
        if is_adapter(name)
    }
    save_tensors(folder / ADAPTER_WEIGHTS, tensors, FORMAT)
    config: Any = module.peft_config[ADAPTER]  # type: ignore[index]
    content = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    text = json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
    write_whole(folder / ADAPTER_CONFIG, text.encode())


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """The adapters of a folder, by the names that they have inside the model."""
    return {
        name.removeprefix(_PREFIX).replace(".weight", f".{ADAPTER}.weight"): tensor
        for name, tensor in read_tensors([folder / ADAPTER_WEIGHTS])
    }
