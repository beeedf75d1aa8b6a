"""Liger's LM head for losses that need the sampled token alone: on Hopper GPUs one kernel that never writes the logits.

Our own head (head.py) stands in for everything else: other hardware, float32, top-k losses, a bias, a soft cap. What the
kernel computes is compared with it once, before anything is learned.
"""

# N response tokens, H hidden size, V vocabulary

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from opd_cache.errors import ConfigError, ModelError
from opd_cache.models import PROBE_TOLERANCE

log = logging.getLogger(__name__)

# (hidden [N, H], weight [V, H], target ids [N], logit scale) → (log-probs [N] in float32, with gradient; entropy [N]).
FusedLogprobs = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
HOPPER = (9, 0)
PROBE_ROWS = 64


def fused_logprobs(wanted: str, device: torch.device, dtype: torch.dtype) -> FusedLogprobs | None:
    """Liger's function, or None where ours is to be used. wanted: learn.liger.

    auto: where Liger has a kernel of its own. always: everywhere; off Hopper Liger computes in chunks of torch operations.
    Raises ConfigError when it must be used and is not installed.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    if wanted == "never" or (wanted == "auto" and not (is_hopper and dtype is torch.bfloat16)):
        return None
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        if is_hopper:
            import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401
    except ImportError as error:
        if wanted == "always":
            raise ConfigError(
                f"learn.liger = 'always', but Liger's fused head cannot be imported ({error}). Run: pip install 'opd-cache[liger]'"
            ) from error
        log.info("learn   Liger's kernel for this GPU is not installed: pip install 'opd-cache[liger]' (%s)", error)
        return None

    def logprobs(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        nll_N, entropy_N = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_NH, weight_VH, target_N, temperature=1 / scale, return_entropy=True
        )
        return -nll_N, entropy_N.detach().float()

    return logprobs


def check_fused(found: FusedLogprobs, expected: FusedLogprobs, hidden_NH: Tensor, weight_VH: Tensor) -> None:
    """Compare two ways in values and gradients, on rows of real hidden states. Raises ModelError."""
    hidden_NH = hidden_NH[:PROBE_ROWS]
    target_N = torch.arange(len(hidden_NH), device=hidden_NH.device) * 31 % len(weight_VH)

    def of(function: FusedLogprobs) -> list[Tensor]:
        hidden, weight = hidden_NH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
        with torch.enable_grad():
            logprobs_N, entropy_N = function(hidden, weight, target_N, 1.0)
            total = (logprobs_N * torch.linspace(-1, 1, len(target_N), device=target_N.device)).sum()
        return [logprobs_N.detach(), entropy_N, *torch.autograd.grad(total, (hidden, weight))]

    names = ("log-probs", "entropy", "gradient of the hidden states", "gradient of the weight")
    for name, ours, theirs in zip(names, of(expected), of(found), strict=True):
        difference = ((ours.float() - theirs.float()).norm() / ours.float().norm().clamp(min=1e-6)).item()
        if not difference <= PROBE_TOLERANCE[weight_VH.dtype]:
            raise ModelError(
                f"Liger's fused head differs from the plain one by {difference:.2g} of the {name} on this machine. Use learn.liger=never."
            )
