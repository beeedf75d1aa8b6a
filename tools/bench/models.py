"""The models that benchmarks measure with: shapes by name, random weights, and tokenizers that go with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 151_936
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
}  # fmt: skip


def save_random_model(shape: str, folder: Path, seed: int = 0, **options: Any) -> Qwen2ForCausalLM:
    """A Qwen2-shaped model with random weights, tied head and a context of 2,048 tokens, saved into the folder."""
    torch.manual_seed(seed)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, **options)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """As many tokens as that: <pad>, <eos>, and words `w2`, `w3`, ... between blanks."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, size)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )
