"""report.html: all on one page, and nothing from elsewhere."""

import html.parser
import re
from pathlib import Path

import pytest

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
    assert page.headings == ["Scores", "Curves", "Throughput", "Pictures", "Refused samples", "Configuration"]
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
