"""MTEB and MIEB (Muennighoff et al. 2023; Xiao et al. 2025) on our checkpoints: an encoder for the package `mteb`.

mteb.evaluate(MtebEncoder("runs/clip"), mteb.get_tasks(["STS12", "CIFAR10ZeroShot"]))
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.checkpoints.load import load_checkpoint

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class MtebEncoder:
    """An encoder in the sense of `mteb.models.EncoderProtocol`.

    Args:
        checkpoint: a run's directory, one of its checkpoints, or a model of open_clip as `mmpretrain.evaluate` takes it.
        device: device of the model.
        ema: load the moving average of the weights.
        trust: names that the run's configuration may contain besides those of mmpretrain, as in `mmpretrain.load`.

    Raises: ValueError if there is no checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: torch.device | str = "cpu",
        ema: bool = False,
        trust: Sequence[str] = (),
    ) -> None:
        self._loaded = load_checkpoint(checkpoint, device, trust, ema)
        self._revision = self._loaded.fingerprint[:12]

    def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> Tensor:
        """Embed the batches of a data loader of MTEB.

        Args:
            inputs: batches with `text`, `image` (of Pillow) or both; both are added, as MTEB's encoders of CLIP do.
            options: what MTEB tells of the task and of batches, which does not change the embeddings.

        Returns: embeddings float32 [n, e] on the CPU.
        Raises: ValueError for inputs that the model has no encoder for, and for images that cannot be used.
        """
        return torch.cat([self._embedded(batch) for batch in inputs])

    def _embedded(self, batch: Mapping[str, Any]) -> Tensor:
        model, parts = self._loaded.model, []
        if "text" in batch:
            if model.text is None:
                raise ValueError("the task has texts, but model.text is null; expected a task of images alone")
            parts.append(model.embed_texts(*self._loaded.tokenizer(batch["text"])))
        if "image" in batch:
            if self._loaded.preprocess is None:
                raise ValueError("the task has images, but model.image is null; expected a task of texts alone")
            parts.append(model.embed_images(torch.stack([self._loaded.preprocess(each) for each in batch["image"]])))
        if not parts:
            raise ValueError(f"the task has {', '.join(batch)}; expected text or image")
        return torch.stack(parts).sum(0).float().cpu()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of each pair of rows, float32 [n, m]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of rows at the same place, float32 [n]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        """Name of the run, and the hash of its weights as the revision, by which MTEB keeps results."""
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ValueError(
                "the package mteb is missing; install it: pip install 'multimodal-pretrain[mteb]'"
            ) from error
        model = self._loaded.model
        return ModelMeta.create_empty(
            {
                "name": f"mmpretrain/{self._loaded.folder.name}",
                "revision": self._revision,
                "modalities": [name for name in ("image", "text") if getattr(model, name) is not None],
                "embed_dim": model.text_embed_dim or model.image_embed_dim,
                "similarity_fn_name": "cosine",
                "framework": ["PyTorch"],
            }
        )


def _unit(rows: Any) -> Tensor:
    return F.normalize(torch.atleast_2d(torch.as_tensor(rows)).float(), dim=-1)
