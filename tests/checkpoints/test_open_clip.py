"""The export command: a run of ours, opened by open_clip."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mmpretrain
from data_tools.__main__ import main as data_tools
from mmpretrain.checkpoints import open_clip as exporter
from mmpretrain.checkpoints.hugging_face.export import export as hugging_face
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.module_encoder import ModuleEncoder
from tests import exports, runs, tiny

OPEN_CLIP_SHAPE = (
    "model.vision={layers: 1, width: 32, head_width: 16, image_size: 32, patch_size: 8}",
    "model.text={width: 32, heads: 2, layers: 1, vocab_size: 400, context_length: 16}",
)


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    finished = runs.train(folder, f"data.root={pairs}", "trainer.duration=2steps", "objective=[sigmoid]")
    assert finished.code == 0, finished.stderr
    return folder / "run"


def test_open_clip_opens_it_with_the_same_embeddings(run: Path, tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.export", [f"checkpoint={run}", f"output={tmp_path}/out"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert [Path(line).name for line in finished.stdout.split()] == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}
    theirs = open_clip.create_model(f"local-dir:{tmp_path}/out").eval()
    ours, _, tokenizer = mmpretrain.load(run)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    ids, lengths = tokenizer(["a red circle", "a cross", "blue"])
    padded = torch.nn.functional.pad(ids, (0, theirs.context_length - ids.shape[1]))
    with torch.no_grad():
        image, text = theirs.encode_image(ours.normalize(images), normalize=True), theirs.encode_text(padded, True)
    torch.testing.assert_close(ours.embed_images(images), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_texts(ids, lengths), text, rtol=0, atol=1e-5)
    results = runs.records(run)[-1]
    assert theirs.logit_scale.exp().item() == pytest.approx(results["train/sigmoid_logit_scale"], rel=1e-2)
    assert theirs.logit_bias.item() == pytest.approx(results["train/sigmoid_logit_bias"], rel=1e-2)
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"][0] > 0.4


@pytest.mark.parametrize(
    "model", [(), ("model=open_clip", "model.name=ViT-B-32", *OPEN_CLIP_SHAPE)], ids=["ours", "open_clip"]
)
def test_the_end_of_a_text_is_that_of_its_tokenizer(model: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    arguments = ["tokenizer", f"{pairs}/train", "--caption", "txt", "--vocab-size", "300", "--output", str(path)]
    assert data_tools(arguments) == 0
    settings = ["trainer.duration=2steps", f"data.tokenizer.path={path}", f"data.root={pairs}", "eval=[]"]
    kept = [o for o in runs.TINY_RUN if not (model and o.startswith("model"))]
    vocabulary = [] if model else ["model.text.vocab_size=400"]
    finished = runs.run("mmpretrain.train", [*kept, *model, *vocabulary, *settings], tmp_path)
    assert finished.code == 0, finished.stderr
    finished = runs.run("mmpretrain.export", [f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"], tmp_path)
    assert finished.code == 0, finished.stderr
    theirs = open_clip.create_model(f"local-dir:{tmp_path}/out").eval()
    ours, _, tokenizer = mmpretrain.load(tmp_path / "run")
    ids, lengths = tokenizer(["a red circle", "a cross", "blue"])
    padded = torch.nn.functional.pad(ids, (0, theirs.context_length - ids.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(ours.embed_texts(ids, lengths), theirs.encode_text(padded, True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=out", "format=onxx"], "format is 'onxx'; did you mean 'onnx'?"),
        ([], "output has no value"),
        (
            ["output=FILE/sub"],
            "output is 'FILE/sub', which cannot be written (Not a directory); expected a folder that",
        ),
        (["output=FILE"], "FILE', a file; expected a folder"),
        (["output=/proc/x/y"], "output is '/proc/x/y', which cannot be written (No such file or directory); expected"),
        ([f"output={'a' * 250}"], "a', which cannot be written (File name too long); expected a folder that can be"),
    ],
)
def test_wrong_use_is_told_in_one_line(run: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").touch()
    finished = runs.run("mmpretrain.export", [f"checkpoint={run}", *arguments], tmp_path)
    assert finished.code == 2
    assert len(finished.stderr.splitlines()) == 1
    assert message in finished.stderr and ".partial" not in finished.stderr


def test_no_file_is_overwritten_and_others_stay(run: Path, tmp_path: Path) -> None:
    arguments = [f"checkpoint={run}", f"output={tmp_path}/out"]
    (tmp_path / "out").mkdir()
    for present, content in (("README.md", "mine"), ("open_clip_config.json", "{}")):
        (tmp_path / "out" / present).write_text(content)
        finished = runs.run("mmpretrain.export", arguments, tmp_path)
        assert finished.code == 2
        message = f"output={tmp_path}/out has a {present} already; expected another folder, or remove the file"
        assert finished.errors == [f"error: {message}"]
        assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [(present, content)]
        (tmp_path / "out" / present).unlink()
    (tmp_path / "out" / ".gitattributes").write_text("*.safetensors")
    assert runs.run("mmpretrain.export", arguments, tmp_path).code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        ".gitattributes", "README.md", "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip
    assert not list(tmp_path.glob(".partial*"))


def test_a_run_and_weights_of_others_are_exported_with_a_card(run: Path, tmp_path: Path) -> None:
    first = runs.run("mmpretrain.export", [f"checkpoint={run}", f"output={tmp_path}/out"], tmp_path)
    assert first.code == 0, first.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | as trained, after step 2 |" in card and "| objectives | 1 × sigmoid |" in card
    arguments = [f"checkpoint=open_clip:local-dir:{tmp_path}/out", f"output={tmp_path}/hf", "format=huggingface"]
    second = runs.run("mmpretrain.export", arguments, tmp_path)
    assert second.code == 0, second.stderr
    assert [Path(line).name for line in second.stdout.split()] == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "Weights of another library" in (tmp_path / "hf" / "README.md").read_text()


def test_the_card_shows_what_evaluate_measures_and_the_run_goes_on(pairs: Path, tmp_path: Path) -> None:
    settings = (f"data.root={pairs}", "trainer.duration=2steps", "trainer.ema_decay=0.5", "checkpoint.every=1steps")
    assert runs.train(tmp_path, *settings).code == 0
    card = ("checkpoint=run", "format=card")
    evaluate = ("device=cpu", "data.workers=0", "cache=none", "eval=[geometry]")
    found = {}
    for step, ema in (("", "false"), ("", "true"), ("/checkpoints/step_00000001", "false")):
        arguments = [f"checkpoint=run{step}", f"ema={ema}", f"output=scores{len(found)}.json", *evaluate]
        finished = runs.run("mmpretrain.evaluate", arguments, tmp_path)
        assert finished.code == 0, finished.stderr
        found[step, ema] = json.loads((tmp_path / f"scores{len(found)}.json").read_text())["eval-val/modality_gap"]
    assert len({*found.values()}) == 3
    names = ("step_00000001.json", "step_00000002-ema.json", "step_00000002.json")
    assert tuple(sorted(file.name for file in (tmp_path / "run/evaluations").glob("*.json"))) == names
    for number, ((step, ema), gap) in enumerate(found.items()):
        arguments = [*card, f"checkpoint=run{step}", f"ema={ema}", f"output=card{number}"]
        finished = runs.run("mmpretrain.export", arguments, tmp_path)
        assert finished.code == 0, finished.stderr
        shown = (tmp_path / f"card{number}" / "README.md").read_text()
        assert f"| `eval-val{'-ema' if ema == 'true' else ''}/modality_gap` | {gap:.4f} |" in shown
        assert ("image_retrieval_recall@1" in shown) == (step == ""), "the training's own scores stay"
    again = runs.train(tmp_path, *settings)
    assert again.code == 0 and "is finished" in again.stderr
    longer = runs.train(tmp_path, *settings, "schedule=constant", "trainer.duration=3steps")
    assert "made with another configuration" in longer.stderr and "evaluations" not in longer.stderr


def test_a_scale_that_is_unknown_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for scalars, count in (({"logit_scale": 20.0}, 0), ({}, 1)):
        loaded = exports.loaded(ImageTextModel(exports.clip_vit(), exports.clip_text(), embed_dim=12), None, scalars)
        for kind, export in (("open_clip", exporter.export), ("huggingface", hugging_face)):
            caplog.clear()
            folder = tmp_path / f"{kind}{count}"
            folder.mkdir()
            export(loaded, folder)
            told = [record for record in caplog.records if "no objective has learnt a logit_scale" in record.message]
            assert len(told) == count, kind
            (weights,) = folder.glob("*.safetensors")
            expected = 1 / 0.07 if count else 20.0
            assert load_file(weights)["logit_scale"].exp().item() == pytest.approx(expected)


def test_a_shape_that_open_clip_does_not_have_is_refused(pairs: Path, tmp_path: Path) -> None:
    overrides = ("trainer.duration=1steps", "model.text.causal=false", "model.text.pool=mean", "eval=[]")
    assert runs.train(tmp_path, f"data.root={pairs}", *overrides).code == 0
    finished = runs.run("mmpretrain.export", [f"checkpoint={tmp_path}/run", "output=out"], tmp_path)
    assert finished.code == 2
    assert "model.text has no open_clip shape: expected causal and pool=last" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_encoders_that_open_clip_does_not_know_are_refused() -> None:
    own = ModuleEncoder(nn.Conv2d(3, 6, 8), 32)
    with pytest.raises(ValueError, match=r"^model\.image has no open_clip shape: ModuleEncoder is none of its towers$"):
        exporter.open_clip_names(ImageTextModel(own, tiny.text(), embed_dim=12))
    with pytest.raises(
        ValueError, match=r"^the model has the towers TimmEncoder and NoneType; expected an image and a text"
    ):
        exporter.open_clip_config(ImageTextModel(tiny.vit(), None, embed_dim=12), {})
