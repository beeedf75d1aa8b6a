"""Activations that are computed again in the backward instead of being kept: all of a block's, or only its cheap ones."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Products of matrices cost a forward's time; all else a block computes costs its memory.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")


def recompute_activations(module: Any, how: str) -> None:
    """Switch a transformers model to train mode with recomputation, without dropout.

    selective: keeps what matrix products and attention gave, about half of all, and computes norms and element-wise
    functions again; full: keeps each block's input alone.
    """
    # transformers checkpoints in train mode only, where dropout would move the student's log-probs.
    _disable_dropout(module)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here draws numbers
    if how == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_keeps)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    module.train()


def _keeps(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    is_kept = name in PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _disable_dropout(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        # Attention and residual dropout are often plain numbers, read in forward.
        for name, value in vars(child).items():
            if "drop" in name and isinstance(value, float):
                setattr(child, name, 0.0)
