"""The trainable student and the files that it is kept in: the same for every engine and number of ranks.

A folder holds a plain Hugging Face model, and in trainer/ the optimizer's tensors by parameter name. Engines give
and take whole tensors, so that a checkpoint of one engine goes on under another.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_cache.config import LearnConfig, ModelConfig
from opd_cache.fingerprint import model_folder
from opd_cache.learn.checkpoint import copy_model_files
from opd_cache.learn.lora import ADAPTER_WEIGHTS, add_adapters, merged, read_adapters, save_adapters
from opd_cache.learn.recompute import recompute_activations
from opd_cache.learn.student import Student
from opd_cache.models import LanguageModel, load_model, load_weights_into
from opd_cache.run_dir import TRAINER
from opd_cache.store.disk import unlike_written, write_whole
from opd_cache.store.publish import read_plain_json
from opd_cache.tensor_files import FORMAT, check_tensors, in_parts, read_tensors, save_tensors

ADAPTER_FOLDER, CONFIG = "adapter", "config.json"
# One core writes a file, so several are written side by side; their tensors are then in memory at once.
OPTIMIZER_FILE_BYTES, FILES_AT_ONCE = 512 << 20, 2
# (label "exp_avg:NAME", tensor) of every optimizer state
OptimizerState = Iterable[tuple[str, Tensor]]


def build_student(options: LearnConfig, student: ModelConfig, folder: Path, device: str) -> Student:
    """The student with the weights of a folder, ready to be trained: float32, with adapters where asked for."""
    uses_lora = options.lora.rank is not None
    config = ModelConfig(
        model=str(model_folder(student) if uses_lora else folder),
        dtype=student.dtype if uses_lora else "float32",
        device=device,
        attn_implementation=student.attn_implementation,
        trust_remote_code=student.trust_remote_code,
    )
    model = load_model(config, "student")
    recomputes = options.gradient_checkpointing != "none"
    if recomputes:
        recompute_activations(model.module, options.gradient_checkpointing)
        model.check_split()
    if uses_lora:
        add_adapters(model, options.lora)
        load_student(model, options, folder)
        if recomputes:
            # Else a checkpointed block whose inputs carry no gradient would be cut off.
            model.module.enable_input_require_grads()
    elif model.device.type == "cpu":
        _leave_the_file(model.module)
    return Student(model, options.precision, options.liger)


def load_student(model: LanguageModel, options: LearnConfig, folder: Path) -> bool:
    """Put a folder's weights into a student in memory; False when they do not fit it. With LoRA the base stays; a
    folder without adapters, the initial student, is left to build_student."""
    if options.lora.rank is None:
        return load_weights_into(model, folder)
    found = next((path for path in (folder, folder / ADAPTER_FOLDER) if (path / ADAPTER_WEIGHTS).is_file()), None)
    if found is None:
        return False
    own = dict(model.module.named_parameters())
    adapters = read_adapters(found)
    if any(name not in own or own[name].shape != tensor.shape for name, tensor in adapters.items()):
        return False
    with torch.no_grad():
        for name, tensor in adapters.items():
            own[name].copy_(tensor)
    return True


def _leave_the_file(module: nn.Module) -> None:
    """Give weights memory of their own. As they are loaded they are pages of their file, and each of them would be copied
    by itself when the optimizer first writes to it, which takes five times as long."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def parameter_groups(module: nn.Module, options: LearnConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the trained parameters: weight decay on matrices, none on vectors."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def write_student(
    folder: Path, state: Mapping[str, Tensor], module: Any, options: LearnConfig, student: ModelConfig
) -> None:
    """Write whole weights, by the names inside `module`, as a Hugging Face folder."""
    source = model_folder(student)
    if options.lora.rank is not None:
        save_adapters(folder / ADAPTER_FOLDER if options.lora.merge else folder, state, module, str(source))
    if options.lora.rank is None or options.lora.merge:
        plain = merged(state, options.lora) if options.lora.rank is not None else dict(state)
        _save_pretrained(folder, plain, module)
    copy_model_files(source, folder, existing=[path.name for path in folder.iterdir()])


def _save_pretrained(folder: Path, state: dict[str, Tensor], module: Any) -> None:
    from transformers import GenerationConfig, modeling_utils

    # transformers refuses to save generation settings that contradict each other, as some models have: theirs is copied.
    settings, module.generation_config = module.generation_config, GenerationConfig()
    loaded = {name: vars(module).pop(name) for name in ("_hf_peft_config_loaded",) if name in vars(module)}
    # The module is nobody's wrapper; to see that by itself, transformers imports DeepSpeed wherever it is installed.
    unwrap, modeling_utils.unwrap_model = modeling_utils.unwrap_model, lambda model: model
    try:
        module.save_pretrained(folder, state_dict=dict(state))  # it takes names out
    finally:
        module.generation_config = settings
        modeling_utils.unwrap_model = unwrap
        vars(module).update(loaded)
    for name in ("generation_config.json", CONFIG):
        (folder / name).unlink(missing_ok=True)
    # As transformers has just written it, but read back.
    write_whole(folder / CONFIG, module.config.to_json_string().encode())
    _check_saved(folder, state, module)


def _check_saved(folder: Path, state: Mapping[str, Tensor], module: Any) -> None:
    """Compare the weights that transformers wrote with the state. Raises DiskError.

    Names that it changed for models that were converted on loading are left alone.
    """
    where = {
        name: path.name for path in sorted(folder.glob("*.safetensors")) for name in check_tensors(path, state, FORMAT)
    }
    saved = [state[name] for name in where if name in state]
    left_out = [tensor for name, tensor in state.items() if name not in where]  # tied to others
    is_whole = where.keys() <= state.keys() and all(_is_among(tensor, saved) for tensor in left_out)
    if not is_whole and not getattr(module, "_weight_conversions", None):
        raise unlike_written(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists() and read_plain_json(index)["weight_map"] != where:
        raise unlike_written(index)


def _is_among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)


def write_optimizer(folder: Path, state: OptimizerState) -> None:
    """Write an optimizer's tensors under trainer/, in files of bounded size."""
    (folder / TRAINER).mkdir(exist_ok=True)
    whole = ((label, tensor.contiguous()) for label, tensor in state)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        writing: deque[Future[None]] = deque()
        for number, tensors in enumerate(in_parts(whole, OPTIMIZER_FILE_BYTES)):
            writing.append(pool.submit(save_tensors, _optimizer_file(folder, number), tensors))
            if len(writing) == FILES_AT_ONCE:
                writing.popleft().result()
        for file in writing:
            file.result()


def read_optimizer(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(state name, parameter name, tensor) of every optimizer state in a policy or checkpoint."""
    for label, tensor in read_tensors((folder / TRAINER).glob("optimizer*.safetensors")):
        key, _, name = label.partition(":")
        yield key, name, tensor


def _optimizer_file(folder: Path, number: int) -> Path:
    return folder / TRAINER / ("optimizer.safetensors" if number == 0 else f"optimizer-{number:04d}.safetensors")
