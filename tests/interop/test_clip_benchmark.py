"""CLIP_benchmark's own code on our checkpoints: the same scores as ours, but for ties."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader

from mmpretrain import evaluate
from mmpretrain.checkpoints import store
from mmpretrain.config.schema import EvalDataConfig, EvaluateConfig, Precision
from mmpretrain.interop import clip_benchmark as interop
from tests.checkpoints.test_foreign import write_open_clip
from tests.saved_runs import save_run
from tests.tars import encode, smooth_pixels, write_tar

pytest.importorskip("clip_benchmark")

NAMES = ["cat", "dog", "ant", "old bus", "red car", "sea", "tree"]
KS = (1, 5, 10)
EVALUATORS = {"zero_shot": "zero_shot.ZeroShot", "retrieval": "retrieval.Retrieval"}


def image(seed: int) -> bytes:
    """A small image of a few colours, so that random weights tell images apart."""
    pixels = smooth_pixels(32, 36, seed) // 2 + np.random.default_rng(seed).integers(0, 128, 3, dtype=np.uint8)
    return encode(pixels.astype(np.uint8), "PNG")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 7 classes; 40 images with one to three captions of their own; and 12 with captions of many images."""
    folder = tmp_path_factory.mktemp("suite")
    labelled = [{"png": image(i), "cls": str(i * i % 7)} for i in range(60)]
    texts = [[f"{'very ' * (i % 3)}number {i} of kind {j}" for j in range(i % 3 + 1)] for i in range(40)]
    captioned = [{"png": image(100 + i), "txt": "\n".join(each)} for i, each in enumerate(texts)]
    shared = [{"png": image(200 + i // 2), "txt": f"text {i // 4}"} for i in range(12)]
    for name, samples in (("labelled", labelled), ("captioned", captioned), ("shared", shared)):
        test = folder / f"wds_{name}" / "test"
        test.mkdir(parents=True)
        write_tar(test / "0.tar", samples[:10])
        write_tar(test / "1.tar", samples[10:], 10)
        (test / "nshards.txt").write_text("2\n")
        if name != "labelled":
            (test.parent / "dataset_type.txt").write_text("retrieval\n")
    (folder / "wds_labelled" / "classnames.txt").write_text("\n".join(NAMES))
    templates = "a photo of a {c}.\nmy {c}, my {c}\n"
    (folder / "wds_labelled" / "zeroshot_classification_templates.txt").write_text(templates)
    return folder


@pytest.fixture(scope="module", params=["run", "open_clip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "run":
        save_run(folder)
        yield str(folder)
    else:
        write_open_clip(folder / "clip", {})
        yield f"open_clip:local-dir:{folder / 'clip'}"


def ours(checkpoint: str, suite: Path) -> dict[str, float]:
    """Scores of `mmpretrain.evaluate`."""
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        cache="none",
        ema=False,
        device="cpu",
        precision=Precision.fp32,
        data=EvalDataConfig(root=str(suite), workers=0, val_batch_size=16, suite="."),
        eval={name: {"_target_": f"mmpretrain.evals.{target}"} for name, target in EVALUATORS.items()},
    )
    return dict(evaluate.run(cfg))


def theirs(checkpoint: str, suite: Path, name: str) -> dict[str, float]:
    """Scores of CLIP_benchmark's functions, as its command calls them."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models import load_clip

    interop.register()
    model, transform, tokenizer = load_clip("mmpretrain", checkpoint, "weights", "", "cpu")
    task = "zeroshot_classification" if name == "labelled" else "zeroshot_retrieval"
    data: Any = build_dataset(f"wds/{name}", str(suite / f"wds_{name}"), transform, "test", task=task)
    loader = DataLoader(data.batched(16), batch_size=None)
    if name == "labelled":
        scores: dict[str, float] = zeroshot_classification.evaluate(
            model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False
        )
        return scores
    scores = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=list(KS))
    return scores


@pytest.mark.slow
def test_scores_are_clip_benchmarks(checkpoint: str, suite: Path) -> None:
    scores = ours(checkpoint, suite)
    for name in ("labelled", "captioned"):
        expected = theirs(checkpoint, suite, name)
        found = {metric: scores[f"eval-{name}/{metric}"] for metric in expected}
        assert found == pytest.approx(expected, abs=1e-6)
        assert len(set(found.values())) > 2 and max(found.values()) > 0.2  # no trivial scores


@pytest.mark.slow
def test_only_ours_know_texts_that_several_images_share(checkpoint: str, suite: Path) -> None:
    # Each text has four images, two pairs of equal ones. CLIP_benchmark accepts the very image that a line belongs to.
    scores, expected = ours(checkpoint, suite), theirs(checkpoint, suite, "shared")
    more = [scores[f"eval-shared/{metric}"] - value for metric, value in expected.items()]
    assert min(more) > -1e-6 and max(more) > 0.1


@pytest.mark.slow
def test_ties_count_for_the_model_at_clip_benchmark_alone(tmp_path: Path, suite: Path) -> None:
    task = save_run(tmp_path / "run")
    constant = {"model.image_projection.weight": 0.0, "model.text_projection.weight": 0.0}
    with torch.no_grad():
        for name, value in constant.items():
            task.state_dict()[name].fill_(value)
    store.save(tmp_path / "run" / "checkpoints", 6, {"model": task.state_dict()}, {"samples": 0}, keep_last=0)
    scores = ours(str(tmp_path / "run"), suite)
    assert theirs(str(tmp_path / "run"), suite, "labelled")["acc5"] > 0.5
    assert theirs(str(tmp_path / "run"), suite, "captioned")["text_retrieval_recall@10"] > 0
    assert scores["eval-labelled/acc5"] == scores["eval-captioned/text_retrieval_recall@10"] == 0


def test_a_model_of_one_encoder_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"has one encoder; expected a model of images and texts"):
        interop.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'w.pth'}")
