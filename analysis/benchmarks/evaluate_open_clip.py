r"""Score any model that open_clip can load on pairs in WebDataset tars, with open_clip's own code alone.

`retrieval`: every pair is its own only positive, as in open_clip's trainer; recall@k is the share of queries
whose positive is among the k best (a tie counts against the model).
`zero_shot`: one text per class (a TSV with the columns `label`, `coarse_label`, `description`); `acc1`,
`coarse_acc1` (right when the predicted class has the true coarse label), and `mean_per_class_recall` over the
classes that occur.

    python evaluate_open_clip.py --model local-dir:DIR [--weights epoch_20.pt] --shards 'val/*.tar' \
        --task zero_shot --classes classes.tsv

DIR holds `open_clip_config.json` (and the weights, unless --weights names them). Encoding is in float32.
"""

import argparse
import csv
import glob
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor

CHUNK = 64  # images or texts encoded at once
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def read_samples(shards: str) -> list[dict[str, bytes]]:
    """Return the samples of the tars that match the glob pattern `shards`, in stored order: {suffix: bytes}."""
    paths = sorted(glob.glob(shards))
    if not paths:
        raise SystemExit(f"no shard matches {shards!r}; give a glob pattern of existing .tar files")
    samples: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    key, _, suffix = member.name.partition(".")
                    samples.setdefault((path, key), {})[suffix] = content.read()
    return list(samples.values())


def image_of(sample: dict[str, bytes]) -> Image.Image:
    """Return the image of a sample."""
    return Image.open(io.BytesIO(next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)))


def recall(similarity: Tensor, k: int) -> float:
    """Return the fraction of rows of `similarity` [N, N] whose diagonal is among the k largest; ties count against it."""
    positive = similarity.diagonal().unsqueeze(1)
    return ((similarity >= positive).sum(1) <= k).float().mean().item()


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Return the recalls of normalised pairs [N, D] in both directions; image_retrieval is text to image."""
    similarity = images @ texts.T
    return {
        f"{name}_recall@{k}": recall(matrix, k)
        for name, matrix in (("image_retrieval", similarity.T), ("text_retrieval", similarity))
        for k in (1, 5)
    }


def zero_shot(
    images: Tensor, class_texts: Tensor, labels: list[str], classes: list[dict[str, str]]
) -> dict[str, float]:
    """Return the accuracies of images [N, D] with true `labels` against one text per class [C, D], both normalised."""
    index = {row["label"]: i for i, row in enumerate(classes)}
    target = torch.tensor([index[label] for label in labels])
    predicted = (images @ class_texts.T).argmax(1)
    coarse_names = sorted({row["coarse_label"] for row in classes})
    coarse = torch.tensor([coarse_names.index(row["coarse_label"]) for row in classes])
    correct = (predicted == target).float()
    per_class = torch.stack([correct[target == c].mean() for c in target.unique()])
    return {
        "acc1": correct.mean().item(),
        "coarse_acc1": (coarse[predicted] == coarse[target]).float().mean().item(),
        "mean_per_class_recall": per_class.mean().item(),
    }


@torch.inference_mode()
def score(
    task: str,
    samples: list[dict[str, bytes]],
    classes: list[dict[str, str]],
    embed_images: Callable[[list[Image.Image]], Tensor],
    embed_texts: Callable[[list[str]], Tensor],
) -> dict[str, float]:
    """Return the metrics of `task`, given functions that embed images and texts, [n, D] of unit length."""
    images = embed_images([image_of(sample) for sample in samples])
    if task == "retrieval":
        return retrieval(images, embed_texts([sample["txt"].decode() for sample in samples]))
    labels = [json.loads(sample["json"])["label"] for sample in samples]
    return zero_shot(images, embed_texts([row["description"] for row in classes]), labels, classes)


def read_classes(path: Path) -> list[dict[str, str]]:
    """Return the rows of a TSV of classes."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip's model name: local-dir:DIR, or a built-in one")
    parser.add_argument("--weights", help="epoch_N.pt of open_clip's trainer, or a safetensors file")
    parser.add_argument("--shards", required=True, help="glob pattern of the validation tars")
    parser.add_argument("--task", required=True, choices=("retrieval", "zero_shot"))
    parser.add_argument("--classes", type=Path, help="TSV with label, coarse_label, description; zero_shot needs it")
    parser.add_argument("--output", type=Path, help="also write the metrics there as JSON")
    args = parser.parse_args()
    if args.task == "zero_shot" and args.classes is None:
        parser.error("--task zero_shot needs --classes TSV")
    model, _, preprocess = open_clip.create_model_and_transforms(args.model)
    if args.weights is not None:
        open_clip.load_checkpoint(model, args.weights)
    model.eval()
    tokenizer = open_clip.get_tokenizer(args.model)

    def embed_images(images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images])
        return torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(CHUNK)])

    def embed_texts(texts: list[str]) -> Tensor:
        return torch.cat([model.encode_text(part, normalize=True) for part in tokenizer(texts).split(CHUNK)])

    classes = read_classes(args.classes) if args.classes is not None else []
    metrics = score(args.task, read_samples(args.shards), classes, embed_images, embed_texts)
    text = json.dumps(metrics, indent=2)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
