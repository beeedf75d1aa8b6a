"""Models: which, how they are loaded, and what vLLM is told."""

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING

from opd_cache import registry
from opd_cache.config.options import option

# OmegaConf reads the annotations: it wants Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class ModelConfig:
    """A model and how it is loaded."""

    model: str = option(MISSING, "Folder or Hugging Face name of a causal language model.")
    revision: Optional[str] = option(None, "Branch, tag or commit of a Hugging Face model.")
    dtype: str = option(
        "auto",
        "Weights and compute. auto: bfloat16 on a GPU that has it, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    attn_implementation: Optional[str] = option(None, "sdpa, eager, flash_attention_2; null: transformers chooses.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Off unless you know it.")


@dataclass
class TeacherPrompt:
    """A prompt of the teacher's own, such as one with a worked solution. The response ids stay the student's."""

    template: Optional[str] = option(
        None,
        "Text with {field} places, filled from the prompt's fields; {prompt} and {answer} are the student's prompt and the expected answer. null: the teacher sees the student's token ids.",
    )
    system_prompt: Optional[str] = option(None, "A system message put before it (chat template only).")
    apply_chat_template: bool = option(False, "Wrap it in the teacher tokenizer's chat template.")
    chat_template_kwargs: dict[str, Any] = option(dict, "Passed to the chat template, such as enable_thinking.")


@dataclass
class TeacherConfig(ModelConfig):
    """A teacher: a model that gives log-probs of the student's tokens."""

    model: str = option(
        MISSING,
        "Folder or Hugging Face name of a causal language model; or a policy of this run, loaded like the student: policy:current is the one that sampled the episode, policy:0 the initial student.",
    )

    scorer: Optional[str] = option(None, "Overrides score.scorer for this teacher.", table=registry.SCORERS)
    vllm: dict[str, Any] = option(dict, "Overrides keys of score.vllm for this teacher.")
    urls: Optional[list[str]] = option(None, "scorer=http: this teacher's own servers, instead of score.http.urls.")
    prompt: TeacherPrompt = option(TeacherPrompt, "What it sees in place of the student's prompt.")

    @property
    def policy(self) -> str | None:
        """`current` or a version, where the teacher is a policy of the run; else None."""
        kind, _, version = self.model.partition(":")
        return version if kind == "policy" else None


@dataclass
class VllmOptions:
    """vLLM's engine arguments. null: what vLLM chooses."""

    tensor_parallel_size: int = option(1, "GPUs that hold the model together.", min=1)
    gpu_memory_utilization: Optional[float] = option(
        None, "Share of the GPU's memory that vLLM takes. Lower it where something else is on the GPU.", above=0, max=1
    )
    kv_cache_memory_bytes: Optional[int] = option(
        None, "Memory for keys and values instead. Without a GPU, set it: some 10 MB serve a tiny model.", min=1
    )
    max_model_len: Optional[int] = option(
        None, "Longest sequence in tokens; null: the model's. A smaller one needs less memory.", min=2
    )
    max_num_batched_tokens: Optional[int] = option(
        None,
        "Tokens in one forward. null: 2,048 for scoring, since prompt log-probs take 6 bytes × vocabulary a token outside what vLLM accounts for.",
        min=1,
    )
    max_num_seqs: Optional[int] = option(None, "Sequences in one forward.", min=1)
    block_size: Optional[int] = option(
        None, "Tokens in one block of the cache: prompts are shared in whole blocks.", min=1
    )
    quantization: Optional[str] = option(None, "Such as fp8, awq; null: as the model's config says.")
    seed: int = option(0, "Of the engine. Samples have seeds of their own.", min=0)
    enforce_eager: bool = option(False, "No compilation and no CUDA graphs: starts sooner, runs slower.")
    engine_args: dict[str, Any] = option(dict, "Any other of vLLM's engine arguments, by its name there.")
