"""The demo command: a page on this machine that answers through Gradio's client, and what is told in one line."""

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmpretrain.interactive.server import check_installed
from tests import runs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "gradio"})
    with pytest.raises(ValueError, match=r"gradio is not installed; pip install 'multimodal-pretrain\[demo\]'"):
        check_installed()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["checkpoint=nowhere"], {}, "nowhere holds no checkpoint"),
        (["checkpoint=nowhere", "port=0"], {}, "port is 0; expected a number at least 1"),
        (["checkpoint=nowhere"], {"WORLD_SIZE": "2", "RANK": "0"}, "2 processes were started; expected one"),
        (["checkpoint=nowhere", "prot=1"], {}, "did you mean 'port'?"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    finished = runs.run("mmpretrain.demo", arguments, tmp_path, environment)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert message in line


class Demo:
    """A running demo and a client of its page."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        settings = ["device=cpu", "workers=0", f"port={self.port}", *arguments]
        self.command = runs.Command("mmpretrain.demo", settings, folder)
        self.command.wait_for(lambda: "Ctrl-C ends it" in self.command.stderr, "a page")
        client = pytest.importorskip("gradio_client")
        self.client = client.Client(f"http://127.0.0.1:{self.port}/", verbose=False, download_files=False)

    def ask(self, name: str, *arguments: Any) -> Any:
        return self.client.predict(*arguments, api_name=f"/{name}")

    def end(self, number: signal.Signals) -> runs.Finished:
        self.client.close()
        self.command.send(number)
        return self.command.wait()


@pytest.mark.slow
def test_the_page_answers_until_it_is_interrupted(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    mae = ["objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2"]
    runs.trained(tmp_path, pairs, "objective=[infonce,mae]", *mae, "trainer.duration=2steps", "eval=[]")
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(runs.png(number, "red"))
    demo = Demo(tmp_path, "checkpoint=run", "images=photos", "cache=kept")
    assert not [line for line in demo.command.stderr.splitlines() if "no tab" in line]
    image = handle_file(tmp_path / "photos" / "3.png")

    found = demo.ask("search_by_text", "a red circle", 3)
    assert len(found) == 3 and all(Image.open(each["image"]["path"]).size == (32, 32) for each in found)
    found = demo.ask("search_by_image", image, 2)
    assert found[0]["caption"] == "1.000  3.png"
    scored = demo.ask("classify", image, "circle\ncross\nsquare", "a {}")["confidences"]
    assert {each["label"] for each in scored} == {"circle", "cross", "square"}
    assert sum(each["confidence"] for each in scored) == pytest.approx(1, abs=1e-4)
    assert [each["caption"].split("  ")[0] for each in demo.ask("word_maps", image, "red <b>")] == [
        "red <b>",
        "red",
        "b",
    ]
    assert len(demo.ask("reconstruct", image, 0)) == 12
    assert len(demo.ask("reconstruct", image, None)) == 12, "a cleared field"

    (tmp_path / "bad.png").write_bytes(b"no image")
    for arguments, message in (
        ((handle_file(tmp_path / "bad.png"), "a\nb", "{}"), "no readable image"),
        ((image, "a", "{}"), "the number of classes is 1"),
        ((None, "a\nb", "{}"), "no image is given"),
        ((image, "a\nb", "<i>"), "&lt;i&gt;"),
    ):
        with pytest.raises(AppError, match=message):
            demo.ask("classify", *arguments)

    with pytest.raises(AppError, match="the text is empty"):
        demo.ask("search_by_text", None, 3)

    finished = demo.end(signal.SIGINT)
    assert finished.code == 0 and "Traceback" not in finished.stderr, finished.stderr
    assert finished.stderr.splitlines()[-1] == "ending"
    assert not Path(found[0]["image"]["path"]).exists(), "temporary files are removed"


@pytest.mark.slow
def test_a_port_in_use_is_told_and_embeddings_are_kept(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", "eval=[]")
    arguments = ["checkpoint=run", f"images={pairs}/val", "cache=kept"]
    demo = Demo(tmp_path, *arguments)
    assert "no tab Reconstruction: the checkpoint has no objective mae" in demo.command.stderr
    second = runs.run("mmpretrain.demo", [*arguments, "device=cpu", "workers=0", f"port={demo.port}"], tmp_path)
    assert second.code == 2 and second.errors == [
        f"error: port {demo.port} of 127.0.0.1 cannot be used; expected a free one: port=..."
    ]
    assert "the embeddings of images were computed before" in second.stderr
    assert demo.end(signal.SIGTERM).code == 0
