"""MTEB's own code on our checkpoints, with tasks of local data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.interop.mteb import MtebEncoder
from tests.saved_runs import save_run
from tests.tars import smooth_pixels

TEXTS = ["a photo of a cat", "two dogs", "an ant", "the old bus"]
OTHERS = [1, 2, 1, 0]
"""Number of the text that each text is compared with."""
PICTURES = [Image.fromarray(smooth_pixels(30 + i % 3, 34, i)) for i in range(12)]
LABELS = [i * i % 4 for i in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    save_run(folder)
    return str(folder)


def embeddings(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Our embeddings of the pictures and of the texts."""
    loaded = load_checkpoint(run)
    assert loaded.preprocess is not None
    images = loaded.model.embed_images(torch.stack([loaded.preprocess(each) for each in PICTURES]))
    return images.numpy(), loaded.model.embed_texts(*loaded.tokenizer(TEXTS)).numpy()


def test_batches_are_embedded_and_images_with_texts_added(run: str) -> None:
    images, texts = embeddings(run)
    encoder = MtebEncoder(run)
    found = encoder.encode([{"text": TEXTS[:3]}, {"text": TEXTS[3:]}], batch_size=3)
    np.testing.assert_allclose(found, texts, atol=1e-6)
    np.testing.assert_allclose(encoder.encode([{"image": PICTURES}]), images, atol=1e-6)
    both = encoder.encode([{"image": PICTURES[:4], "text": TEXTS}]).numpy()
    np.testing.assert_allclose(both, images[:4] + texts, atol=1e-6)
    cosines = both @ both.T / np.linalg.norm(both, axis=1)[:, None] / np.linalg.norm(both, axis=1)
    np.testing.assert_allclose(encoder.similarity(both, both), cosines, atol=1e-6)
    np.testing.assert_allclose(
        encoder.similarity_pairwise(both, both[::-1].copy()), np.diag(cosines[:, ::-1]), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"^the task has audio; expected text or image$"):
        encoder.encode([{"audio": [1]}])


@pytest.mark.slow
def test_tasks_of_images_and_of_texts_have_the_scores_of_our_embeddings(run: str) -> None:
    pytest.importorskip("mteb")
    zero_shot, sts = _tasks()
    encoder = MtebEncoder(run)
    images, texts = embeddings(run)
    accuracy = _main_score(encoder, zero_shot)
    assert accuracy == pytest.approx(((images @ texts.T).argmax(1) == LABELS).mean())
    similarity = (texts * texts[OTHERS]).sum(1)
    assert _main_score(encoder, sts) == pytest.approx(spearmanr(similarity, range(4)).statistic)
    meta = encoder.mteb_model_meta
    assert meta.name == "mmpretrain/mine" and meta.modalities == ["image", "text"]


def _main_score(encoder: MtebEncoder, task: Any) -> float:
    import mteb

    results = mteb.evaluate(encoder, task, cache=None, encode_kwargs={"batch_size": 5}, show_progress_bar=False)  # type: ignore[arg-type]
    return float(results.task_results[0].get_score())


def _tasks() -> tuple[Any, Any]:
    """Tasks of zero-shot classification of the pictures, and of the similarity of texts."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    def described(kind: str, score: str, category: str, modalities: list[str]) -> TaskMetadata:
        return TaskMetadata(
            name=f"Local{kind}", type=kind, main_score=score, category=category, modalities=modalities,
            description="", dataset={"path": "local", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
            reference=None, date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

    def local(columns: dict[str, list[Any]]) -> Callable[..., None]:
        def load_data(self: Any, num_proc: int | None = None, **options: Any) -> None:
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

        return load_data

    class LocalZeroShot(AbsTaskZeroShotClassification):
        metadata = described("ZeroShotClassification", "accuracy", "i2t", ["image", "text"])
        load_data = local({"image": PICTURES, "label": LABELS})

        def get_candidate_labels(self) -> list[str]:
            return TEXTS

    class LocalSTS(AbsTaskSTS):
        metadata = described("STS", "cosine_spearman", "t2t", ["text"])
        min_score, max_score = 0, 3
        load_data = local({"sentence1": TEXTS, "sentence2": [TEXTS[i] for i in OTHERS], "score": list(range(4))})

    return LocalZeroShot(), LocalSTS()
