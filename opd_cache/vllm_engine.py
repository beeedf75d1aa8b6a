"""vLLM's offline engine in this process: made, fed with a bounded number of requests at once, given new weights, closed.

What is asked of it is in the sampler (rollout/samplers/vllm.py) and the scorer (score/scorers/vllm.py).
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# The engine runs in this process and not in one of its own, says only what is wrong, beside the results, and reports to
# nobody.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import numpy as np  # noqa: E402
import vllm  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from opd_cache.config import ModelConfig, VllmOptions  # noqa: E402
from opd_cache.errors import ConfigError, EngineOutputError, ModelError  # noqa: E402
from opd_cache.fingerprint import model_folder  # noqa: E402
from opd_cache.garbage import keep_what_is_there  # noqa: E402
from opd_cache.models import ADAPTER_CONFIG, TRUST_HINT, dtype_name  # noqa: E402
from opd_cache.stall import note_progress  # noqa: E402
from opd_cache.types import Float32Array, Int32Array  # noqa: E402

VERSION = f"vllm {vllm.__version__}"
# Requests inside the engine at once: enough to fill its batches, few enough to bound what their results take.
IN_FLIGHT = 512

Request = tuple[int, list[int], SamplingParams]


class VllmEngine:
    """A loaded model. `uses_token_ids`: whether it scores chosen ids of chosen rows (its second model runner)."""

    def __init__(self, config: ModelConfig, options: VllmOptions, key: str, **settings: Any) -> None:
        """settings: the stage's own engine arguments. key: the recipe section of the options, for messages.

        Raises ConfigError or ModelError with the engine's reason.
        """
        self.folder = model_folder(config)
        _check_folder(self.folder, config)
        arguments = {**engine_arguments(options), **settings}
        try:
            keep_what_is_there()  # all modules are in memory, and no model yet
            self.llm = vllm.LLM(
                model=str(self.folder),
                dtype=dtype_name(config),
                trust_remote_code=config.trust_remote_code,
                skip_tokenizer_init=True,  # ids go in and ids come out
                generation_config="vllm",  # a model's own may hold a repetition penalty
                worker_extension_cls="opd_cache.vllm_worker.CheckpointLoader",
                **arguments,
            )
        except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"vLLM cannot load {config.model!r}: {reason} Its settings are {key}.* in the recipe."
            ) from error
        engine_config = self.llm.llm_engine.vllm_config
        self.uses_token_ids = bool(getattr(engine_config, "use_v2_model_runner", False))
        self.context_length: int = engine_config.model_config.max_model_len
        self.vocab_size: int = engine_config.model_config.get_vocab_size()
        self.max_logprobs: int = engine_config.model_config.max_logprobs

    def stream(self, requests: Iterable[Request]) -> Iterator[Any]:
        """A finished RequestOutput for each (key, token ids, parameters), in the order in which they finish; request_id is
        the key. At most IN_FLIGHT are inside the engine."""
        engine, waiting = self.llm.llm_engine, iter(requests)
        in_flight = 0
        is_drained = False
        try:
            while True:
                while not is_drained and in_flight < IN_FLIGHT:
                    request = next(waiting, None)
                    if request is None:
                        is_drained = True
                        break
                    key, ids, parameters = request
                    engine.add_request(str(key), {"prompt_token_ids": ids}, parameters)
                    in_flight += 1
                if not in_flight:
                    return
                finished = [output for output in engine.step() if output.finished]
                in_flight -= len(finished)
                if finished:
                    note_progress("a response of the engine")
                yield from finished
        finally:
            if in_flight:
                engine.abort_request(list(engine.output_processor.request_states))

    def forget_prefixes(self) -> None:
        """Drop cached keys and values: what the old weights made must not be read under the new ones."""
        self.llm.llm_engine.reset_prefix_cache()

    def load_weights(self, folder: Path) -> list[str]:
        """Take another checkpoint of the same model, in place; names of the tensors that did not arrive."""
        found = self.llm.llm_engine.collective_rpc("load_checkpoint", args=(str(folder),))
        self.forget_prefixes()
        self.folder = folder
        return [name for names in found for name in names]

    def logprobs_of(self, prompt_ids: list[int], response_ids: list[int]) -> Any:
        """Log-probs [R] of a response, read from no cache."""
        (output,) = self.stream([(0, [*prompt_ids, *response_ids], scoring_parameters(**flat_form(0)))])
        return prompt_logprobs_of(output, np.array(response_ids, np.int32), 0)[0]

    def close(self) -> None:
        """Give the memory back."""
        with contextlib.suppress(AttributeError):
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def engine_arguments(options: VllmOptions) -> dict[str, Any]:
    """The options that were set, as vLLM names them; engine_args count last."""
    named = {name: value for name, value in asdict(options).items() if name != "engine_args" and value is not None}
    return {**named, **options.engine_args}


def with_overrides(options: VllmOptions, overrides: dict[str, Any]) -> VllmOptions:
    """A teacher's own settings over those of the stage."""
    return replace(options, **overrides)


def parameters(**settings: Any) -> SamplingParams:
    """Sampling parameters for ids in and ids out: one output at the end, no text."""
    return SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True, **settings)


def scoring_parameters(*, shares_prefixes: bool = False, **form: Any) -> SamplingParams:
    """Parameters that score the prompt, in one of the forms; one token is generated, which nobody reads."""
    return parameters(
        max_tokens=1, temperature=0.0, ignore_eos=True, skip_reading_prefix_cache=not shares_prefixes, **form
    )


def flat_form(top_k: int) -> dict[str, Any]:
    """The form that every engine knows: at every position the prompt's own token, then its k likeliest."""
    return {"prompt_logprobs": top_k, "flat_logprobs": True}


FlatColumns = tuple[Float32Array, Int32Array, Int32Array, Float32Array]


def prompt_logprobs_of(output: Any, response_ids: Int32Array, top_k: int) -> FlatColumns:
    """flat_columns of a request's last R prompt tokens."""
    flat, num_tokens = output.prompt_logprobs, len(output.prompt_token_ids)
    begin = flat.start_indices[num_tokens - len(response_ids)] if len(flat) == num_tokens else 0
    return flat_columns(flat, begin, response_ids, top_k)


def flat_columns(flat: Any, begin: int, ids: Int32Array, top_k: int) -> FlatColumns:
    """(log-probs [R], ranks [R], top-k ids [R, K], top-k log-probs [R, K]) of flat log-probs from entry `begin` on, which
    must be of these ids. Raises EngineOutputError."""
    size, width = len(ids), top_k + 1
    lengths = {len(values) - begin for values in (flat.token_ids, flat.logprobs, flat.ranks)}
    if lengths != {size * width}:
        raise EngineOutputError(
            f"vLLM gave {len(flat.logprobs)} log-probs at {len(flat)} positions, {size} of them of the response; expected {top_k + 1} a position."
        )
    # Lists of Python numbers: half the time of np.asarray, and of the ranks only the sampled tokens' count.
    found = np.fromiter(flat.token_ids[begin:], np.int32, size * width).reshape(size, width)
    logprobs = np.fromiter(flat.logprobs[begin:], np.float32, size * width).reshape(size, width)
    if not np.array_equal(found[:, 0], ids):
        raise EngineOutputError("vLLM gave log-probs of other token ids than the response's.")
    return (
        logprobs[:, 0],
        np.fromiter(flat.ranks[begin::width], np.int32, size),
        found[:, 1:],
        logprobs[:, 1:],
    )


def _check_folder(folder: Path, config: ModelConfig) -> None:
    from transformers import CONFIG_MAPPING

    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: holds LoRA adapters and no whole model, which vLLM cannot load here. Use learn.lora.merge=true, or a merged model."
        )
    content = json.loads((folder / "config.json").read_text())
    # Code beside a model that transformers knows is not run; the model is loaded without it.
    needs_code = "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING
    if needs_code and not config.trust_remote_code:
        raise ModelError(f"{folder}: comes with Python code of its own (auto_map in config.json). {TRUST_HINT}")
