"""Loading causal language models, and running their body and their LM head apart.

The head at every position is what fills memory ([tokens, vocabulary] in float32); so the body gives hidden states and
the head runs only at the positions that predict a response token.
"""

# B sequences, T positions, N response tokens of a batch, H hidden size, V vocabulary

import contextlib
import ctypes
import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from opd_cache.config import ModelConfig
from opd_cache.errors import ConfigError, ModelError
from opd_cache.fingerprint import model_folder
from opd_cache.garbage import keep_what_is_there, no_garbage_collection
from opd_cache.store.disk import disk_error
from opd_cache.tensor_files import open_again, read_tensors, tensor_shapes

LOADING_ERRORS = (
    OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError,
    torch.serialization.pickle.UnpicklingError,  # weights in a .bin file that are more than tensors
)  # fmt: skip
TRUST_HINT = "Set trust_remote_code=true for this model if you know it."
T = TypeVar("T")
ADAPTER_CONFIG = "adapter_config.json"

# Share of the largest logit. Both ways run the same kernels; what differs is the rounding of another batch shape.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
# Share of a hidden state's length: rounding adds up over layers, while what is wrong differs by about the length itself.
HIDDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def resolve_device(name: str) -> torch.device:
    """auto → the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device = {name!r} is no torch device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device = {name!r}, but torch sees no GPU. Use device=auto or cpu.")
    return device


def free_memory(name: str) -> tuple[int, str]:
    """(bytes that are free for a model on this device, what they are of)."""
    device = resolve_device(name)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"GPU memory ({device})"
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 1 << 60)
    return available, "memory"


def gpu_bytes(name: str) -> int:
    """All memory of the GPU of that name; 0 where the device is none."""
    device = resolve_device(name)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto → bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrices are multiplied in while the weights stay float32; None: in float32 too. auto as in resolve_dtype."""
    dtype = resolve_dtype(precision, device)
    return None if dtype is torch.float32 else dtype


def dtype_name(config: ModelConfig) -> str:
    """The dtype that a model will compute in: float32, bfloat16 or float16."""
    return str(resolve_dtype(config.dtype, resolve_device(config.device))).removeprefix("torch.")


def padded(
    sequences: Sequence[np.ndarray], side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both int64 [B, T], of token ids of different lengths."""
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place] = sequence
        mask[row, place] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def hidden_difference(found_TH: Tensor, expected_TH: Tensor) -> float:
    """How far hidden states lie from others at most, as a share of the length of those."""
    expected_TH = expected_TH.float()
    return ((found_TH.float() - expected_TH).norm(dim=-1) / expected_TH.norm(dim=-1)).max().item()


def tensors_on(device: torch.device, holder: T) -> T:
    """A dataclass with its tensors, and those of dataclasses in it, on a device."""
    if isinstance(holder, Tensor):
        return holder.to(device, non_blocking=True)  # type: ignore[return-value]
    if isinstance(holder, tuple):
        return tuple(tensors_on(device, part) for part in holder)  # type: ignore[return-value]
    if not dataclasses.is_dataclass(holder):
        return holder
    parts = {field.name: tensors_on(device, getattr(holder, field.name)) for field in dataclasses.fields(holder)}
    return dataclasses.replace(holder, **parts)  # type: ignore[type-var]


@contextlib.contextmanager
def explained_memory_errors(key: str, value: int) -> Iterator[None]:
    """Turn a GPU that is out of memory into one line that names the key to lower. Raises ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of GPU memory with {key} = {value}; lower it. ({str(error).splitlines()[0]})"
        ) from error


class LanguageModel:
    """A causal LM as a body and a head: `hidden` gives [B, T, H], `logits` gives float32 [N, V] of chosen rows."""

    def __init__(self, module: Any, source: str) -> None:
        self.module = module
        self.source = source
        self.body: Any = self.module.base_model
        head = self.module.get_output_embeddings()
        if head is None or self.body is self.module:
            raise ModelError(
                f"{source}: a {type(module).__name__} has no language-model head; expected a causal language model."
            )
        self.head: Any = head
        config = self.module.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale: float = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = head.weight.shape[0]
        # A CPU without instructions for bfloat16 multiplies it five times slower than float32.
        self._slow_head = (
            head.weight.device.type == "cpu"
            and head.weight.dtype == torch.bfloat16
            and type(head) is torch.nn.Linear
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, **options: Any) -> Tensor:
        """Last hidden states [B, T, H]. Without a mask, position_ids that start again tell packed sequences apart."""
        return self.body(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **options
        ).last_hidden_state

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Next-token logits [N, V] in float32 of hidden states [N, H]."""
        return self.finished(self.head_output(hidden_NH))

    def head_buffer(self, num_rows: int) -> Tensor | None:
        """Memory for `head_output` of so many rows, where to use it again saves a CPU a tenth of the product's time; on
        a GPU the allocator does so by itself."""
        is_product = type(self.head) is torch.nn.Linear and self.head.bias is None and not self._slow_head
        if self.device.type != "cpu" or not is_product:
            return None
        return torch.empty(num_rows, self.vocab_size, dtype=self.dtype)

    def head_output(self, hidden_NH: Tensor, buffer: Tensor | None = None) -> Tensor:
        """What the LM head gives for hidden states [N, H], in its own dtype; `finished` makes logits of it. It lies in the
        buffer, where there is one."""
        if buffer is not None:
            return torch.mm(hidden_NH, self.head.weight.t(), out=buffer[: len(hidden_NH)])
        if self._slow_head:
            bias_V = None if (bias := getattr(self.head, "bias", None)) is None else bias.float()
            return torch.nn.functional.linear(hidden_NH.float(), self.head.weight.float(), bias_V)
        return self.head(hidden_NH)

    def finished(self, head_output_NV: Tensor) -> Tensor:
        """Float32 logits of the head's output; the same memory where nothing is to be done."""
        logits_NV = head_output_NV.float()
        if self.logit_scale != 1:
            logits_NV = logits_NV * self.logit_scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def frozen(self) -> "LanguageModel":
        """Itself, without gradients."""
        self.module.requires_grad_(False)
        return self

    def check_split(self) -> None:
        """Refuse an architecture whose logits are not head(body): what we compute must be what it means."""
        ids = torch.arange(2, 10, device=self.device).remainder(self.vocab_size).unsqueeze(0)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            whole = self.module(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            split = self.logits(self.hidden(ids, mask)[0])
        difference = (whole - split).abs().max().item()
        if not difference <= PROBE_TOLERANCE[self.dtype] * max(1.0, whole.abs().max().item()):
            raise ModelError(
                f"{self.source}: a {type(self.module).__name__} changes its logits after the LM head (by up to {difference:.3g}) in a way that opd-cache does not know; its log-probs would be wrong."
            )


def load_model(config: ModelConfig, role: str) -> LanguageModel:
    """Load a model in eval mode, dropout off. Raises ModelError.

    role: "student" or "teacher", for the message.
    """
    with no_garbage_collection():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    keep_what_is_there()

    transformers_logging.disable_progress_bar()  # our own progress says what is being done
    folder = model_folder(config)
    device = resolve_device(config.device)
    if device.type == "cuda":
        # It compiles a kernel for every new shape, some 40 ms on an H100; sampling has one at every token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    options: dict[str, Any] = {
        "dtype": resolve_dtype(config.dtype, device),
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    adapters = folder / ADAPTER_CONFIG
    try:
        base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.is_file() else folder
        module = open_again(folder.glob("*.safetensors"), lambda: AutoModelForCausalLM.from_pretrained(base, **options))
        if adapters.is_file():
            module = _with_adapters(module, folder)
    except LOADING_ERRORS as error:
        if failing := disk_error(error, folder):
            raise failing from error
        hint = f" {TRUST_HINT}" if "trust_remote_code" in str(error) and not config.trust_remote_code else ""
        raise ModelError(
            f"{role} {config.model!r} cannot be loaded: {str(error).strip().splitlines()[0]}{hint}"
        ) from error
    model = LanguageModel(module.to(device).eval(), config.model)
    model.check_split()
    return model


def _with_adapters(module: Any, folder: Path) -> Any:
    """A base model with a folder's LoRA adapters added to its weights: it computes as a plain one."""
    from peft import PeftModel

    return PeftModel.from_pretrained(module, str(folder)).merge_and_unload()


def load_weights_into(model: LanguageModel, folder: Path) -> bool:
    """Replace a warm model's weights by those of a folder; False when the files do not fit it name by name.

    A tied head has no entry of its own; it shares the embedding's tensor and so follows it.
    """
    paths = list(folder.glob("*.safetensors"))
    shapes, own = tensor_shapes(paths), dict(model.module.state_dict(keep_vars=True))
    if any(name not in own or own[name].shape != shape for name, shape in shapes.items()):
        return False
    covered = {own[name].data_ptr() for name in shapes}
    if any(tensor.data_ptr() not in covered for tensor in own.values()):
        return False
    with torch.no_grad():
        for name, tensor in read_tensors(paths):
            own[name].copy_(tensor)
    return True


def give_back_memory() -> None:
    """Return what dropped models held, to the system and to the GPU's other users."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        # Layers of some megabytes lie in glibc's heap, which keeps them.
        ctypes.CDLL(None).malloc_trim(0)


def set_torch_threads(threads: int | None) -> None:
    """Fix torch's CPU threads: the order of float sums, and so the last bits, depends on them."""
    if threads is not None:
        torch.set_num_threads(threads)
