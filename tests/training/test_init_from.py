"""First weights from a run, a file or open_clip; what does not fit is named."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.checkpoints.open_clip import export, to_open_clip
from mmpretrain.config import instantiate
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import add_adapters, has_adapters, plain_name
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.objectives.classification import Classification
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.training.init_from import init_from
from mmpretrain.training.task import Task
from tests import exports, runs, saved_runs, tiny

CLIP_SHAPE: dict[str, Any] = {"pre_norm": True}


def make_task(*objectives: str, seed: int = 0, **image_args: Any) -> Task:
    torch.manual_seed(seed)
    model = tiny.image_text(**image_args)
    makers = {
        "infonce": lambda: InfoNCE(model, init_logit_scale=20 + seed),
        "sigmoid": lambda: Sigmoid(model, init_logit_scale=20 + seed),
        "mae": lambda: MAE(model, decoder_width=8, decoder_depth=1, decoder_heads=2),
    }
    return Task(model, {name: makers[name]() for name in objectives or ("infonce",)})


def save_run(folder: Path, task: Task) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("{}\n")
    parts = {"model": task.state_dict(), "optimizer": {"x/step": torch.ones(())}}
    store.save(folder / "checkpoints", 1, parts, {}, keep_last=0)
    return folder


def assert_equal(ours: Task, theirs: Task, prefix: str = "") -> None:
    for name, tensor in theirs.state_dict().items():
        if name.startswith(prefix):
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_run_or_its_file_gives_every_weight(tmp_path: Path) -> None:
    source = make_task("infonce", "mae", seed=1)
    run = save_run(tmp_path / "run", source)
    for place in (
        run,
        run / "checkpoints" / "step_00000001",
        run / "checkpoints" / "step_00000001" / "model.safetensors",
    ):
        task = make_task("infonce", "mae")
        init_from(task, str(place))
        assert_equal(task, source)


def test_other_objectives_heads_are_said_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_task("infonce", "mae", seed=1)
    task = make_task("infonce", "sigmoid")
    fresh = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with caplog.at_level("INFO"):
        init_from(task, str(save_run(tmp_path / "run", source)))
    assert_equal(task, source, "model.")
    assert_equal(task, source, "objectives.infonce.")
    assert torch.equal(task.state_dict()["objectives.sigmoid.logit_bias"], fresh["objectives.sigmoid.logit_bias"])
    assert "starts anew: objectives.sigmoid.logit_scale, objectives.sigmoid.logit_bias" in caplog.text
    assert "is not used: objectives.mae." in caplog.text


def test_a_model_without_text_takes_the_images_side(tmp_path: Path) -> None:
    source = make_task("infonce", "mae", seed=1)
    model = ImageTextModel(tiny.vit(), None, embed_dim=12)
    task = Task(model, {"mae": MAE(model, decoder_width=8, decoder_depth=1, decoder_heads=2)})
    init_from(task, str(save_run(tmp_path / "run", source)))
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_model_without_images_takes_the_texts_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_task(seed=1)
    model = ImageTextModel(None, tiny.text(), embed_dim=12)
    task = Task(model, {"causal_lm": CausalLM(model)})
    with caplog.at_level("INFO"):
        init_from(task, str(save_run(tmp_path / "run", source)))
    assert_equal(task, source, "model.text")
    assert "is not used: model.image" in caplog.text


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    task = make_task()
    tensors = make_task(seed=1).state_dict()
    del tensors["model.text.ln_final.weight"]
    tensors["model.image.extra"] = torch.ones(1)
    tensors["model.image_projection.weight"] = torch.ones(3, 3)
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with pytest.raises(ValueError, match=r"^init_from=.* does not fit this model: ") as error:
        init_from(task, str(file))
    for part in (
        "1 are missing: model.text.ln_final.weight",
        "1 are left over: model.image.extra",
        "1 have another shape: model.image_projection.weight",
    ):
        assert part in str(error.value)
    assert all(torch.equal(tensor, task.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["safetensors", "pt", "training checkpoint"])
def test_open_clips_files_give_towers_and_temperature(kind: str, tmp_path: Path) -> None:
    source, task = (make_task(seed=seed, **CLIP_SHAPE) for seed in (1, 0))
    tensors = to_open_clip(source.model, logit_scale=33.0)
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(tensors, file)
    elif kind == "pt":
        torch.save(tensors, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in tensors.items()}}, file)
    init_from(task, str(file))
    assert_equal(task, source, "model.")
    assert task.logit_scale == pytest.approx(33.0)


def test_positions_of_another_grid_are_interpolated(tmp_path: Path) -> None:
    source = make_task(seed=1)
    model = tiny.image_text(image_size=2 * tiny.IMAGE_SIZE)
    task = Task(model, {"infonce": InfoNCE(model)})
    init_from(task, str(save_run(tmp_path / "run", source)))
    ours, theirs = (t.state_dict()["model.image.trunk.pos_embed"] for t in (task, source))
    assert ours.shape[1] == 1 + 4 * tiny.NUM_PATCHES
    assert torch.equal(ours[:, 0], theirs[:, 0]), "the class token has no place"
    torch.testing.assert_close(ours[:, 1:].mean(), theirs[:, 1:].mean(), rtol=0.2, atol=0.02)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"its weights cannot be read .* expected a \.safetensors, or a \.pt"):
        init_from(make_task(), str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def legacy(tensors: object, folder: Path) -> bytes:
    """A file of torch's format before zip."""
    torch.save(tensors, folder / "legacy", _use_new_zipfile_serialization=False)
    return (folder / "legacy").read_bytes()


def test_no_damaged_file_of_weights_ends_in_a_traceback(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = legacy({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path)
    damaged = [b"abc def", legacy({"a": torch.ones(3), 1: torch.ones(3)}, tmp_path)]
    damaged += [whole[:length] for length in range(0, len(whole) - 8, 5)]
    for content in damaged:
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^init_from=.*its weights cannot be read \(\w+\); expected a \.safetensors"
        ):
            init_from(make_task(), str(tmp_path / "weights.pt"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"^init_from=nowhere: there is no such file, and open_clip does not know it"),
        ("ViT-B-32/nope", r"ViT-B-32 has the tags openai, laion400m_e31"),
        ("/tmp", r"^init_from=/tmp: .*holds no checkpoint"),
    ],
)
def test_a_source_that_is_not_there_is_told(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_from(make_task(), source)


def test_a_run_begins_with_the_weights_and_resumes_without_them(pairs: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    assert runs.train(first, f"data.root={pairs}", "trainer.duration=2steps").code == 0
    settings = (f"data.root={pairs}", f"init_from={first}/run", "schedule=constant", "optimizer.lr=0.0", "run.seed=5")
    finished = runs.train(second, *settings, "trainer.duration=1steps")
    assert finished.code == 0, finished.stderr
    assert runs.tensors(second / "run", "model.safetensors") == runs.tensors(first / "run", "model.safetensors")
    (first / "run").rename(first / "gone")
    finished = runs.train(second, *settings, "trainer.duration=2steps")
    assert finished.code == 0, finished.stderr
    refused = runs.train(second, *settings[:1], *settings[2:], "trainer.duration=3steps")
    assert "init_from: " in refused.errors[0]


@pytest.mark.slow
def test_the_average_begins_with_the_weights_too(pairs: Path, tmp_path: Path) -> None:
    settings = (f"data.root={pairs}", "trainer.duration=2steps", "eval=[contrastive_loss]")
    assert runs.train(tmp_path, *settings, "run.dir=first").code == 0
    averaged = ("init_from=first", "trainer.ema_decay=0.9", "optimizer.lr=0")
    assert runs.train(tmp_path, *settings, *averaged, "run.dir=second", "run.seed=1").code == 0
    scores = runs.results(tmp_path / "second")
    assert scores["eval-val-ema/contrastive_loss"] == pytest.approx(scores["eval-val/contrastive_loss"], rel=1e-5)


def test_open_clip_trains_on_from_our_checkpoint(tmp_path: Path) -> None:
    """Out to open_clip's own loader and back."""
    source = make_task(seed=1, **CLIP_SHAPE)
    export(exports.unchanged(source.model, {"logit_scale": 20.0}), tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randint(0, 256, (2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.encode_image(source.model.normalize(images), normalize=True)
    torch.testing.assert_close(source.model.eval().embed_images(images), expected, rtol=0, atol=1e-5)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "back.pt")
    task = make_task(**CLIP_SHAPE)
    init_from(task, str(tmp_path / "back.pt"))
    assert_equal(task, source, "model.")


@pytest.mark.parametrize(
    "content", [[1], {}, {"a": 1}, {"state_dict": [1]}, {"state_dict": {}}, {1: torch.ones(1)}, None]
)
def test_a_file_of_other_things_is_refused_in_one_line(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"its weights cannot be read .* expected a \.safetensors, or a \.pt"):
        init_from(make_task(), str(tmp_path / "other.pt"))


def with_adapters(task: Task, scale: float = 0.0) -> Task:
    """The task with adapters, which are zero or noise."""
    pytest.importorskip("peft")
    add_adapters(task.model, rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if has_adapters([name]):
                parameter.copy_(scale * torch.randn_like(parameter))
    return task


def test_adapters_start_anew_on_a_plain_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_task("infonce", seed=1)
    task = with_adapters(make_task("infonce"), 0.5)
    fresh = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with caplog.at_level("INFO"):
        init_from(task, str(save_run(tmp_path / "run", source)))
    for name, tensor in task.state_dict().items():
        expected = fresh[name] if has_adapters([name]) else source.state_dict()[plain_name(name)]
        assert torch.equal(tensor, expected), name
    assert "starts anew: model.image.trunk.blocks.0.attn.qkv.lora_A.default.weight" in caplog.text


def test_adapters_go_on_open_clips_weights(tmp_path: Path) -> None:
    source = make_task("infonce", seed=1, **CLIP_SHAPE)
    file = tmp_path / "open_clip_model.safetensors"
    save_file(to_open_clip(source.model, 30.0, None), file)
    task = with_adapters(make_task("infonce", **CLIP_SHAPE))
    init_from(task, str(file))
    batch = tiny.batch([4, 9])
    theirs = source.model.embed_images(batch.images("pairs"))
    assert torch.allclose(task.model.embed_images(batch.images("pairs")), theirs, atol=1e-5)


def test_adapters_of_a_source_are_merged(tmp_path: Path) -> None:
    source = with_adapters(make_task("infonce", seed=1), 0.3)
    run = save_run(tmp_path / "run", source)
    (run / "config.yaml").write_text("trainer: {lora: {alpha: 4.0}}\n")
    batch = tiny.batch([4, 9])
    expected = source.model.embed_images(batch.images("pairs"))
    for task in (make_task("infonce"), with_adapters(make_task("infonce"))):
        init_from(task, str(run))
        assert torch.allclose(task.model.embed_images(batch.images("pairs")), expected, atol=1e-5)


def test_a_scale_of_another_objective_is_taken(tmp_path: Path) -> None:
    source = make_task("sigmoid", seed=1)
    model = tiny.image_text()
    parts = {name: Classification(model, num_classes=3, features="embedding") for name in ("first", "second")}
    init_from(Task(model, parts), str(save_run(tmp_path / "run", source)))
    for each in parts.values():
        assert float(each.logit_scale.detach().exp()) == pytest.approx(21.0)


def test_of_several_scales_the_first_of_the_configuration_is_taken(tmp_path: Path) -> None:
    saved_runs.save_run(tmp_path)  # sigmoid's scale is 20, and the second, infonce's, is 30
    model = instantiate.instantiate(saved_runs.MODEL, 0, "model")
    head = Classification(model, num_classes=3, features="embedding")
    init_from(Task(model, {"own": head}), str(tmp_path))
    assert float(head.logit_scale.detach().exp()) == pytest.approx(20.0)
    assert load_checkpoint(tmp_path).scalars["logit_scale"] == pytest.approx(20.0)
