"""Sorting letters: `sort sycidpou:` → `cdiopsuy`. A byte-level tokenizer and two Qwen2-shaped models, trained here.

The teacher learns until it is nearly always right; the smaller student is stopped early: its best guess is often right,
its samples seldom, which is what on-policy distillation then mends. All of it is in the Hugging Face format.
"""

import json
import logging
import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from opd_cache.errors import MismatchError
from opd_cache.models import set_torch_threads
from opd_cache.store.publish import publish_folder, read_plain_json
from opd_cache.types import derive_seed

log = logging.getLogger(__name__)

NUM_TRAIN, NUM_HELD_OUT, NUM_LETTERS = 20_000, 500, 8
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 64, 2e-3, 10
TEACHER = {"hidden_size": 256, "steps": 160}
STUDENT = {"hidden_size": 128, "steps": 98}


def make_task(folder: Path, seed: int, torch_threads: int | None) -> None:
    """Write teacher/, student/, train.jsonl and heldout.jsonl, unless they are there. About a minute on two cores."""
    description = folder / "task.json"
    wanted = {"task": "sort_letters", "seed": seed}
    if description.exists():
        found = read_plain_json(description)
        if found != wanted:
            raise MismatchError(
                f"{folder}: holds the task {found}, the recipe wants {wanted}. Choose another task.dir."
            )
        return
    if folder.exists():
        raise MismatchError(f"{folder}: exists, but is no task made by opd-cache. Choose another task.dir.")
    set_torch_threads(torch_threads)
    log.info("task    making %s: %d problems, a teacher and a student", folder, NUM_TRAIN + NUM_HELD_OUT)

    def fill(target: Path) -> None:
        train, held_out = make_problems(seed)
        _write_jsonl(target / "train.jsonl", train, "train")
        _write_jsonl(target / "heldout.jsonl", held_out, "heldout")
        tokenizer = byte_tokenizer()
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            model = train_model(shape, train, tokenizer, derive_seed(seed, name), name)
            model.save_pretrained(target / name)
            tokenizer.save_pretrained(target / name)
        (target / "task.json").write_text(json.dumps(wanted))

    publish_folder(folder, fill)


def make_problems(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training problems, held-out problems), no word in both."""
    rng = random.Random(derive_seed(seed, "problems"))
    words: dict[str, None] = {}
    while len(words) < NUM_TRAIN + NUM_HELD_OUT:
        words["".join(rng.sample(string.ascii_lowercase, NUM_LETTERS))] = None
    problems = [(f"sort {word}:", "".join(sorted(word))) for word in words]
    return problems[:NUM_TRAIN], problems[NUM_TRAIN:]


def _write_jsonl(path: Path, problems: list[tuple[str, str]], name: str) -> None:
    with open(path, "w") as file:
        for number, (prompt, answer) in enumerate(problems):
            file.write(json.dumps({"id": f"{name}-{number}", "prompt": prompt, "answer": answer}) + "\n")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and separate <pad> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{character: index + 2 for index, character in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # No text is unknown to a byte-level tokenizer; without a name for it, loading as Qwen2 would add a token of its own.
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def train_model(
    shape: dict[str, int], problems: list[tuple[str, str]], tokenizer: Any, seed: int, name: str
) -> Qwen2ForCausalLM:
    """Train a Qwen2-shaped model on problems and answers from scratch; cross-entropy on the answer and EOS."""
    torch.manual_seed(seed)
    hidden, steps = shape["hidden_size"], shape["steps"]
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        batch = [problems[index] for index in order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        prompts = torch.tensor(tokenizer([prompt for prompt, _ in batch])["input_ids"])
        answers = torch.tensor(tokenizer([answer + "<eos>" for _, answer in batch])["input_ids"])
        # Every problem has the same length: no padding anywhere.
        logits = model(input_ids=torch.cat([prompts, answers[:, :-1]], 1)).logits[:, prompts.shape[1] - 1 :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 40 == 0 or step + 1 == steps:
            log.info("task    %s step %d/%d | loss %.3f", name, step + 1, steps, loss.item())
    return model.eval()
