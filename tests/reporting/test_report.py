"""report.html: all on one page, and nothing from elsewhere."""

import html.parser
import re
from collections import Counter
from pathlib import Path

import pytest

from mmpretrain.optim import tower_of
from mmpretrain.reporting.overview import overview
from mmpretrain.reporting.report import _joined
from tests import runs


class Page(html.parser.HTMLParser):
    """What a page shows and asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self._tag = ""
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action") and value]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._tag == "h2":
            self.headings.append(data)
            self._tag = ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    data = runs.write_pairs(folder / "pairs", broken=(3, 50))
    finished = runs.train(
        folder, f"data.root={data}", "trainer.duration=1epochs", "eval=[retrieval,gallery,patch_similarity,projector]",
        "data.max_bad_fraction=0.5", "trainer.eval_every=6steps",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    return folder / "run"


def test_report_holds_everything_and_asks_for_nothing(run: Path) -> None:
    page = Page()
    source = (run / "report.html").read_text()
    page.feed(source)
    assert page.headings == ["Run", "Scores", "Curves", "Throughput", "Pictures", "Refused samples", "Configuration"]
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://", re.sub(r"<pre>.*?</pre>", "", source, flags=re.DOTALL))
    assert len(page.images) == 2 + 1 + 4  # train and eval-val curves, throughput, pictures
    for expected in ("eval-val/image_retrieval_recall@1", "2 samples", "000003", "no readable image", "_target_"):
        assert expected in page.text


def test_pictures_stand_as_files_beside_tensorboards(run: Path) -> None:
    names = {path.name for path in (run / "pictures").iterdir()}
    assert names == {
        "train.pairs.png", "eval-val.text_to_image.png", "eval-val.image_to_text.png", "eval-val.patch_similarity.png",
    }  # fmt: skip
    projector = (run / "tensorboard" / "projector_config.pbtxt").read_text()
    assert projector.count("embeddings {") >= 2


def test_report_begins_with_what_was_trained_on_what(run: Path) -> None:
    source = (run / "report.html").read_text()
    (table,) = re.findall(r"<h2>Run</h2><table>(.*?)</table>", source)
    rows = dict(re.findall(r"<td>(.*?)</td><td>(.*?)</td>", table))
    assert list(rows) == ["model", "objectives", "data, pairs", "length", "optimizer", "hardware"]
    sizes: Counter[str] = Counter()
    for name, tensor in runs.weights(run, 13).items():
        sizes[tower_of(name)] += tensor.numel()
    assert rows["model"].startswith(
        "ImageTextModel, image vit_base_patch16_clip_224, text TextTransformer; parameters: "
    )
    assert all(f"{tower} {size:,}" in rows["model"] for tower, size in sizes.items())
    assert rows["objectives"] == "1 × infonce"
    assert rows["data, pairs"].startswith("200 samples in 2 files of train in ")
    assert re.fullmatch(
        r"1epochs, batches of 16, 13 steps, 208 samples, 0:\d\d:\d\d h of wall time, [\d,.]+ pairs/s", rows["length"]
    )
    assert rows["optimizer"].startswith("adamw, lr 0.001, weight decay 0.2, schedule ")
    assert rows["hardware"] == "1 × cpu, fp32"
    assert "pairs_per_second" not in re.findall(r"<h2>Scores</h2><table>(.*?)</table>", source)[0]


def test_report_of_a_run_without_run_json_leaves_out_what_it_does_not_know() -> None:
    assert overview({}, {}, {}) == {}
    config = {"objective": {"mae": {"weight": {"linear": {"0%": 0, "20%": 0.1}}}}, "trainer": {"precision": "bf16"}}
    assert overview(config, {}, {"steps": 1234}) == {
        "objectives": "{linear: {0%: 0, 20%: 0.1}} × mae", "length": "1,234 steps", "hardware": "bf16",
    }  # fmt: skip


def test_loss_of_the_only_objective_is_drawn_once() -> None:
    axis, loss = [16.0, 32.0], [3.0, 2.0]
    only = [("train/loss", axis, loss), ("train/lr", axis, loss), ("train/infonce_loss", axis, loss)]
    assert _joined(only) == [("train/loss = train/infonce_loss", axis, loss), ("train/lr", axis, loss)]
    weighted = [("train/loss", axis, loss), ("train/infonce_loss", axis, [6.0, 4.0])]
    assert _joined(weighted) == weighted
