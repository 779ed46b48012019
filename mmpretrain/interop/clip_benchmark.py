"""CLIP_benchmark (Cherti & Beaumont) on our checkpoints: its own command with one more `--model_type`.

    python -m mmpretrain.interop.clip_benchmark eval --model_type mmpretrain --model RUN --pretrained weights --no_amp \\
        --dataset wds/cifar10 --dataset_root FOLDER --num_workers 1 --output scores.json

There may be no more workers, 4 by default, than a data set has tars. A data set of captions needs
`--task zeroshot_retrieval`. The command downloads other data sets than `wds/` ones by itself.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import UsageError, usage_errors
from mmpretrain.models.image_text import ImageTextModel

MODEL_TYPE = "mmpretrain"


class ClipBenchmarkModel(nn.Module):
    """A model with the methods that CLIP_benchmark calls.

    Args:
        model: a model of images and texts.
    """

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Return embeddings float32 [b, e] of unit length, of images uint8 [b, c, h, w] as our preprocessing makes them."""
        return self.model.embed_images(images)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Return embeddings float32 [b, e] of unit length, of texts int64 [b, 1 + L] of `ClipBenchmarkTokenizer`."""
        return self.model.embed_texts(texts[:, 1:], texts[:, 0])


class ClipBenchmarkTokenizer:
    """A tokenizer that gives one tensor for each list of texts.

    Args:
        tokenizer: a tokenizer of ours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenize texts: int64 [n, 1 + longest], the length of each text and then its ids."""
        ids, lengths = self._tokenizer(texts)
        return torch.cat([lengths[:, None], ids], dim=1)


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[ClipBenchmarkModel, Preprocess, Callable[[Sequence[str]], Tensor]]:
    """Load a checkpoint as CLIP_benchmark's `load_clip` does.

    Args:
        model_name: a run's directory, one of its checkpoints, or a model of open_clip as `mmpretrain.evaluate` takes it.
        pretrained: `ema` for the moving average of the weights; any other text for the weights themselves.
        cache_dir: not used.
        device: device of the model.

    Returns: (model, preprocessing of one image, tokenizer).
    Raises: UsageError if there is no checkpoint, or its model lacks an encoder.
    """
    with usage_errors():
        loaded = load_checkpoint(model_name, device, ema=pretrained == "ema")
    if loaded.preprocess is None or loaded.model.text is None:
        raise UsageError(f"{model_name} has one encoder; expected a model of images and texts for CLIP_benchmark")
    return ClipBenchmarkModel(loaded.model), loaded.preprocess, ClipBenchmarkTokenizer(loaded.tokenizer)


def register() -> None:
    """Make `--model_type mmpretrain` known to CLIP_benchmark in this process. Raises: UsageError without that package."""
    try:
        from clip_benchmark import models
        from clip_benchmark.metrics import linear_probe, zeroshot_classification
    except ImportError as error:
        raise UsageError(
            "the package clip-benchmark is missing; install it: pip install 'multimodal-pretrain[clip-benchmark]'"
        ) from error
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    # Version 1.6.2 makes numbers of arrays [1], which NumPy refuses since 2.4.
    zeroshot_classification.accuracy = linear_probe.accuracy = _accuracy


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Return CLIP_benchmark's top-k accuracies of logits [n, C] and labels [n]."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [float(hits[:, :k].any(dim=1).double().mean()) for k in topk]


def main() -> None:
    """Run CLIP_benchmark's command. A UsageError ends it with one line and exit code 2."""
    try:
        register()
        from clip_benchmark import cli

        cli.main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
