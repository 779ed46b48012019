"""The embed command: images or texts in, an array and its keys out, resumable."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmpretrain
from tests import runs


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    finished = runs.train(folder, f"data.root={pairs}", "trainer.duration=2steps", "eval=[]")
    assert finished.code == 0, finished.stderr
    return folder / "run"


def embed(folder: Path, run: Path, *arguments: str) -> runs.Finished:
    settings = [f"checkpoint={run}", "device=cpu", "workers=0", "output=out"]
    return runs.run("mmpretrain.embed", [*settings, *arguments], folder)


def test_images_of_tars_and_texts_of_a_file(run: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a red circle\n\na cross\n")
    finished = embed(tmp_path, run, f"images={pairs}/val", "texts=texts.txt", "batch_size=7")
    assert finished.code == 0, finished.stderr
    rows, texts = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("images", "texts"))
    keys = (tmp_path / "out" / "images.keys.txt").read_text().splitlines()
    assert rows.shape == (runs.NUM_HELD_OUT, 16) and rows.dtype == np.float32
    assert keys == [f"{number:06d}" for number in range(runs.NUM_PAIRS, runs.NUM_PAIRS + runs.NUM_HELD_OUT)]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    model, _, tokenizer = mmpretrain.load(run)
    expected = model.embed_texts(*tokenizer(["a red circle", "a cross"])).numpy()
    np.testing.assert_allclose(texts, expected, atol=1e-6)
    assert (tmp_path / "out" / "texts.keys.txt").read_text() == "a red circle\na cross\n"
    again = embed(tmp_path, run, f"images={pairs}/val", "texts=texts.txt", "batch_size=7")
    assert again.stderr.count("is there already") == 2


def test_rows_of_other_weights_precision_or_images_are_computed_anew(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes(runs.png(0, "red"))
    rows = []
    for argument in ("precision=fp32", "precision=bf16", "precision=fp32"):
        finished = embed(tmp_path, run, "images=images", argument)
        assert finished.code == 0 and "is there already" not in finished.stderr
        rows.append(np.load(tmp_path / "out" / "images.npy"))
    assert (rows[0] == rows[2]).all() and not (rows[0] == rows[1]).all()
    (folder / "0.png").write_bytes(runs.png(1, "blue"))
    assert "is there already" not in embed(tmp_path, run, "images=images", "precision=fp32").stderr
    assert not (np.load(tmp_path / "out" / "images.npy") == rows[0]).all()


def test_only_line_ends_end_a_text(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("a red\u2028circle\r\n\na cross\x0cof blue".encode())
    assert embed(tmp_path, run, "texts=texts.txt").code == 0
    assert np.load(tmp_path / "out" / "texts.npy").shape == (2, 16)


def test_a_folder_of_images_and_what_it_refuses(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "deep"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(runs.png(number, "red"))
    (folder / "1.png").write_bytes(b"no image")
    finished = embed(tmp_path, run, "images=images")
    assert finished.code == 0, finished.stderr
    assert "refused deep/1.png: no readable image" in finished.stderr
    assert (tmp_path / "out" / "images.keys.txt").read_text() == "deep/0.png\ndeep/2.png\n"
    rows = np.load(tmp_path / "out" / "images.npy")
    model, preprocess, _ = mmpretrain.load(run)
    images = torch.stack([preprocess(folder / f"{number}.png") for number in (0, 2)])
    np.testing.assert_allclose(rows, model.embed_images(images).numpy(), atol=1e-6)


def test_keys_are_written_as_their_bytes_in_a_line_each(run: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    for number, name in enumerate([b"a\nb.png", b"caf\xe9.png", b"d\re.png"]):
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(runs.png(number, "red"))
    finished = embed(tmp_path, run, "images=images")
    assert finished.code == 0, finished.stderr
    assert (tmp_path / "out" / "images.keys.txt").read_bytes() == b"a\\nb.png\ncaf\xe9.png\nd\\re.png\n"
    assert np.load(tmp_path / "out" / "images.npy").shape == (3, 16)


@pytest.mark.slow
def test_it_goes_on_after_a_kill(run: Path, pairs: Path, tmp_path: Path) -> None:
    arguments = [f"checkpoint={run}", "device=cpu", "workers=0", "output=out", f"images={pairs}/train", "batch_size=1"]
    command = runs.Command("mmpretrain.embed", arguments, tmp_path)
    note = tmp_path / "out" / ".progress-images.json"
    command.wait_for(note.exists, "some rows")
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    assert not (tmp_path / "out" / "images.npy").exists()
    finished = runs.run("mmpretrain.embed", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    assert "going on at" in finished.stderr
    (tmp_path / "whole").mkdir()
    whole = runs.run("mmpretrain.embed", arguments, tmp_path / "whole")
    assert whole.code == 0, whole.stderr
    assert (tmp_path / "out" / "images.npy").read_bytes() == (tmp_path / "whole" / "out" / "images.npy").read_bytes()


def test_two_processes_share_the_work_and_write_the_same_files(run: Path, pairs: Path, tmp_path: Path) -> None:
    """Also after a kill, and on from one number of processes to another."""
    (tmp_path / "texts.txt").write_text("".join(f"text number {i}\n" for i in range(11)))
    broken = (3, 7, 200, 201, 202, 203, 290)  # among them all of a batch
    for number in range(2):
        runs.write_shard(tmp_path / "images" / f"{number}.tar", 150 * number, 150, broken)
    shared = [f"checkpoint={run}", "device=cpu", "workers=0", "images=images", "texts=texts.txt", "batch_size=4"]

    def start(output: str, world_size: int) -> list[runs.Command]:
        environments = runs.group(world_size) if world_size > 1 else [{}]
        arguments = [*shared, f"output={output}"]
        return [runs.Command("mmpretrain.embed", arguments, tmp_path, environment) for environment in environments]

    killed = start("out", 2)
    killed[0].wait_for((tmp_path / "out" / ".progress-images.json").exists, "some rows")
    for command in killed:
        command.send(signal.SIGKILL)
    for command in killed:
        assert command.wait().code == -signal.SIGKILL
    first, second = (command.wait() for command in start("out", 2))
    (alone,) = (command.wait() for command in start("alone", 1))
    for finished in (first, second, alone):
        assert finished.code == 0, finished.stderr
    assert "going on at" in first.stderr and "going on at" not in second.stderr
    assert len(first.stdout.splitlines()) == 4 and not second.stdout
    refused = [line for each in (first, second) for line in each.stderr.splitlines() if "refused" in line]
    assert any("refused 000290" in line for line in refused) and len(refused) == len(set(refused))
    assert np.load(tmp_path / "out" / "images.npy").shape == (300 - len(broken), 16)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(f"{kind}{end}" for kind in ("images", "texts") for end in (".npy", ".keys.txt", ".json"))
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def test_preprocess_takes_files_bytes_and_images(run: Path, tmp_path: Path) -> None:
    _, preprocess, _ = mmpretrain.load(run)
    data = runs.png(3, "blue")
    (tmp_path / "a.png").write_bytes(data)
    by_bytes = preprocess(data)
    assert by_bytes.shape == (3, 32, 32) and by_bytes.dtype == torch.uint8
    assert torch.equal(by_bytes, preprocess(tmp_path / "a.png"))
    assert torch.equal(by_bytes, preprocess(Image.open(tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither images nor texts is given"),
        (["images=nowhere"], "no file 'nowhere'"),
        (["texts=nowhere.txt"], "nowhere.txt"),
        (["texts=nowhere.txt", "device=gpu"], "error: device is 'gpu'; expected auto, cpu or cuda"),
    ],
)
def test_wrong_use_is_told_in_one_line(run: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    finished = embed(tmp_path, run, *arguments)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert message in line
