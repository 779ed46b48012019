"""Images of one channel."""

from pathlib import Path

from tests import runs


def test_grey_images_are_trained_on_and_shown(pairs: Path, tmp_path: Path) -> None:
    grey = ("model.image.args.in_chans=1", "+model.image_mean=[0.5]", "+model.image_std=[0.25]")
    grey = (f"+{grey[0]}", *grey[1:])
    runs.trained(tmp_path, pairs, "trainer.duration=2steps", *grey)
    assert runs.weights(tmp_path / "run", 2)["model.image.trunk.patch_embed.proj.weight"].shape[1] == 1
    finished = runs.run("mmpretrain.export", [f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"], tmp_path)
    assert finished.code == 2 and "images of 1 channels" in finished.stderr
    refused = runs.trained(tmp_path, pairs, "trainer.duration=2steps", grey[0], "run.dir=other", code=2)
    assert "model.image takes 1 channels, and model.image_mean has 3 values" in refused.stderr
    refused = runs.trained(tmp_path, pairs, "augmentation=randaugment", *grey, "run.dir=other", code=2)
    assert "images of 1 channels; expected 3" in refused.stderr


def test_grey_images_are_reconstructed(pairs: Path, tmp_path: Path) -> None:
    grey = ("+model.image.args.in_chans=1", "+model.image_mean=[0.5]", "+model.image_std=[0.25]")
    mae = ("objective=[mae]", *runs.TINY_MAE, "eval=[]", "trainer.diagnose_every=1steps")
    runs.trained(tmp_path, pairs, "trainer.duration=2steps", *grey, *mae)
    assert runs.weights(tmp_path / "run", 2)["objectives.mae.predict.weight"].shape == (8 * 8, 32)
