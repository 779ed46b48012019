"""CLIP_benchmark's own code on our checkpoints: the same scores as ours, but for ties."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from tests.suites import write_suite

pytest.importorskip("clip_benchmark")

KS = (1, 5, 10)
EVALUATORS = {"zero_shot": "zero_shot.ZeroShot", "retrieval": "retrieval.Retrieval"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


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
    with torch.no_grad():
        for projection in (task.model.image_projection, task.model.text_projection):
            assert projection is not None
            projection.weight.zero_()
    parts = {"model": task.state_dict(), "optimizer": {"x/step": torch.ones(())}}
    store.save(tmp_path / "run" / "checkpoints", 6, parts, {"samples": 0}, keep_last=0)
    scores = ours(str(tmp_path / "run"), suite)
    assert theirs(str(tmp_path / "run"), suite, "labelled")["acc5"] > 0
    assert theirs(str(tmp_path / "run"), suite, "captioned")["text_retrieval_recall@10"] > 0
    assert scores["eval-labelled/acc5"] == scores["eval-captioned/text_retrieval_recall@10"] == 0


def test_a_wrong_checkpoint_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suite: Path
) -> None:
    arguments = (
        f"eval --model_type mmpretrain --model nowhere --pretrained weights --dataset wds/x --dataset_root {suite}"
    )
    monkeypatch.setattr("sys.argv", ["clip_benchmark", *arguments.split(), "--output", str(suite / "scores.json")])
    with pytest.raises(SystemExit) as ended:
        interop.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere holds no checkpoint; expected")


def test_a_model_of_one_encoder_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"has one encoder; expected a model of images and texts"):
        interop.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'w.pth'}")
