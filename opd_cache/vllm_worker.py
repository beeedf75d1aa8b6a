"""What runs inside vLLM's workers: taking a checkpoint's weights in place. Named by worker_extension_cls."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opd_cache.tensor_files import read_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class CheckpointLoader:
    """Mixed into vLLM's worker; `self` is the worker."""

    model_runner: Any

    def load_checkpoint(self, folder: str) -> list[str]:
        """Load every tensor of a folder; names of those that did not arrive, as far as the model has them in one piece.

        A tied LM head is given too: on some devices the engine keeps a prepared copy of it, which a reload of the
        embedding alone leaves old.
        """
        self.model_runner.reload_weights(weights_iterator=_tensors(Path(folder)))
        own = dict(self.model_runner.get_model().named_parameters())
        return [
            name
            for name, tensor in _tensors(Path(folder))
            if name in own
            and own[name].shape == tensor.shape
            and not torch.equal(own[name].data, tensor.to(own[name].device, own[name].dtype))
        ]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    names = set()
    for name, tensor in read_tensors(folder.glob("*.safetensors")):
        names.add(name)
        yield name, tensor
        if name == EMBEDDING:
            embedding = tensor
    if EMBEDDING in names and HEAD not in names:
        yield HEAD, embedding
