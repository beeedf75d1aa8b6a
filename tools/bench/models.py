"""The models that benchmarks measure with: shapes by name, random weights, and prompts for them."""

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from opd_cache.quickstart.sort_letters import byte_tokenizer

VOCABULARY, EOS = 151_936, 1
SHAPES: dict[str, dict[str, Any]] = {
    # 0.4 M parameters.
    "quickstart": {
        "vocab_size": 258, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    # A body of 10 M and the quickstart's vocabulary.
    "small": {
        "vocab_size": 258, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    # A body of 17 M.
    "medium": {
        "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    # A real vocabulary, 117 M in the head, and a body of 63 M.
    "vocabulary": {
        "vocab_size": VOCABULARY, "hidden_size": 768, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
    # For a GPU: 311 M in the head, and a body of 1.08 B.
    "large": {
        "vocab_size": VOCABULARY, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip


def save_random_model(
    shape: str, folder: Path, seed: int = 0, endless: bool = False, device: str = "cpu"
) -> Qwen2ForCausalLM:
    """A Qwen2-shaped model with random weights, tied head and a context of 2,048 tokens, saved into the folder.

    endless: it never samples its EOS, so that every response has the length that is asked for. device: where it is made;
    the same seed gives other weights there.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=EOS)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    if endless:
        _never_sample(model, EOS)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _never_sample(model: Qwen2ForCausalLM, token: int) -> None:
    """Put the token 25 nats below the others: dimension 0 of the residual stream comes from the embeddings alone, and
    there the token is their opposite."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.model.embed_tokens.weight[:, 0] = 2.0
    model.model.embed_tokens.weight[token, 0] = -2.0


def save_tokenizer(size: int, folder: Path) -> None:
    """The quickstart's, one token a byte, with unused names up to that many tokens, saved into the folder."""
    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    names = content["model"]["vocab"]
    names.update({f"<unused-{index}>": index for index in range(len(names), size)})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, count: int) -> None:
    """Random letters, 180 to 220 of them each, one token a letter."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            prompt = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(180, 220)))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def device_name(device: str) -> str:
    """For tables."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def finish(device: str) -> None:
    """Wait for a GPU, which computes behind the program's back."""
    if device == "cuda":
        torch.cuda.synchronize()
