"""`python -m mmpretrain.train` as its users meet it: wrong use, an objective of their own, sweeps."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmpretrain.config import config_yaml
from mmpretrain.config.command_line import hydra_arguments
from tests import runs

README = Path(__file__).resolve().parents[1] / "README.md"

# ---------------------------------------------------------------------------------------------- wrong use


def assert_refused(finished: runs.Finished, *fragments: str) -> None:
    """Exit code 2, and one line that holds all fragments and nothing else beside it."""
    assert finished.code == 2, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


WRONG_OVERRIDES = {
    "unknown key": ("trainer.batchsize=1", "'trainer.batchsize'", "did you mean 'batch_size'?"),
    "unknown group": ("trainr.batch_size=1", "'trainr'", "did you mean 'trainer'?"),
    "unknown key added": ("+trainer.batchsize=1", "'trainer.batchsize'", "did you mean 'batch_size'?"),
    "unknown key of the data": ("data.train.pairs.shardz=x", "'data.train.pairs.shardz'", "did you mean 'shards'?"),
    "unknown argument": ("objective.infonce.wieght=1", "'objective.infonce.wieght'", "did you mean 'weight'?"),
    "unknown argument added": ("+objective.infonce.striim=x", "'objective.infonce.striim'", "'stream'"),
    "unknown argument of a tower": (
        "optimizer.towers.image.lrr=1",
        "'optimizer.towers.image.lrr'",
        "did you mean 'lr'",
    ),
    "argument of an objective that is not chosen": ("objective.mae.weight=1", "'objective.mae'", "objective=[infonce,"),
    "text for an integer": ("trainer.batch_size=abc", "trainer.batch_size", "'abc'", "Integer"),
    "text for a weight": ("objective.infonce.weight=x", "objective.infonce.weight is 'x'", "expected a number"),
    "a breakpoint without a unit": (
        "objective.infonce.weight={linear: {0%: 1, 20: 2}}",
        "a breakpoint of objective.infonce.weight",
        "20epochs",
    ),
    "a schedule without its brace": (
        "objective.infonce.weight={linear: {0%: 1}",
        "objective.infonce.weight is {linear",
        "braces",
    ),
    "negative weight": ("objective.infonce.weight=-1", "objective.infonce.weight is -1", "at least 0"),
    "text for a number": ("optimizer.lr=fast", "optimizer.lr is 'fast'", "expected float"),
    "too short a list": ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]", "expected tuple[float, float]"),
    "unknown precision": ("trainer.precision=fp8", "trainer.precision", "'fp8'", "bf16, fp16, fp32"),
    "unknown device": ("trainer.device=tpu", "trainer.device is 'tpu'", "auto, cpu or cuda"),
    "nothing where a value must be": ("trainer.duration=null", "trainer.duration", "not Optional"),
    "an argument taken away": ("~optimizer.lr", "optimizer.lr is missing", "expected float"),
    "no equals sign": ("trainer.batch_size", "trainer.batch_size", "EQUAL"),
    "unknown experiment": ("experiment=quickstrat", "no experiment 'quickstrat'", "did you mean 'quickstart'?"),
    "unknown objective": ("objective=[infonce,siggmoid]", "no objective 'siggmoid'", "did you mean 'sigmoid'?"),
    "no group": ("eval=null", "eval=null", "choose none of a list with []"),
    "no objective": ("objective=[]", "no objective", "objective=[infonce]"),
    "unknown evaluator": ("eval=[retreival]", "'retreival'", "did you mean 'retrieval'?"),
    "unknown data set of an evaluator": ("eval.retrieval.data=[test]", "eval.retrieval.data", "'test'", ": val"),
    "unknown model": ("model=clip_huge", "no model 'clip_huge'", "clip_tiny"),
    "a target that does not exist": ("model._target_=nope.Nope", "model._target_ is 'nope.Nope'", "No module named"),
    "unknown unit": ("trainer.duration=20epoks", "trainer.duration is '20epoks'", "20epochs"),
    "no unit": ("trainer.duration=20", "trainer.duration is '20'", "20epochs"),
    "wall time for a length": ("trainer.duration=20min", "trainer.duration is '20min'", "epochs, samples, steps, %"),
    "no length": ("trainer.duration=0steps", "trainer.duration is '0steps'", "above 0"),
    "no interval": ("trainer.log_every=0steps", "trainer.log_every is '0steps'", "above 0"),
    "no interval of checkpoints": ("checkpoint.every=0min", "checkpoint.every is '0min'", "above 0"),
    "no interval of an evaluator": ("eval.retrieval.every=0%", "eval.retrieval.every is '0%'", "above 0"),
    "unknown unit of a warm-up": ("schedule.warmup=5foos", "schedule.warmup is '5foos'", "2000steps"),
    "unknown unit of an evaluator": ("eval.retrieval.every=often", "eval.retrieval.every is 'often'", "2000steps"),
    "no batch": ("trainer.batch_size=0", "trainer.batch_size is 0", "at least 1"),
    "negative workers": ("data.workers=-1", "data.workers is -1", "at least 0"),
    "workers that are no number": (
        "data.workers=many",
        "data.workers is 'many'",
        "expected auto or a number of processes",
    ),
    "no shard matches": ("data.train.pairs.shards=x*.tar", "data.train.pairs.shards", "'x*.tar'", "no tar matches"),
    "no held-out shard": ("data.val.val.shards=nope.tar", "data.val.val.shards", "nope.tar", "name existing tars"),
    "no such root": ("data.root=/nowhere", "data.root=/nowhere", "no file '/nowhere/train'"),
    "no such caption": ("data.train.pairs.caption=json.title", "'title'", "caption, label", "data.train.pairs.caption"),
    "no such member": ("data.train.pairs.caption=text", "no member text", "set data.train.pairs.caption"),
    "no such held-out caption": ("data.val.val.caption=json.title", "'title'", "data.val.val.caption"),
    "captions that are json's whole text": (
        "data.train.pairs.caption=json",
        "data.train.pairs.caption is 'json'",
        "json.",
    ),
    "no captions for an objective": (
        "data.train.pairs.caption=null",
        "data.train.pairs.caption is null",
        "caption=txt",
    ),
    "no images for an objective": ("data.train.pairs.transform=null", "data.train.pairs.transform is null", "expected"),
    "a part of itself": ("trainer.duration=50%", "trainer.duration is '50%'", "epochs, samples or steps"),
    "more than the run": ("schedule.warmup=200%", "schedule.warmup is '200%'", "at most 100%"),
    "a rate without bounds": ("optimizer.lr=inf", "optimizer.lr is inf", "a finite number"),
    "images below a patch": ("model.image.image_size=5", "model.image.image_size is 5", "a patch of"),
    "no rank": ("eval.retrieval.ks=[]", "eval.retrieval: ks is []", "ks=[1,5,10]"),
    "chunks of none": ("eval.retrieval.chunk_size=0", "eval.retrieval: chunk_size is 0", "at least 1"),
    "a stream that is not there": ("data.train.imgs.shards=train", "'data.train.imgs'", "+data.train.imgs.shards=..."),
    "no such group": ("data.train.pairs.group=json.kind", "'kind'", "set data.train.pairs.group to caption, id, cls"),
    "a group that is nothing": ("data.train.pairs.group=foo", "no member foo", "set data.train.pairs.group to caption"),
    "a caption that only some draws need": (
        "data.train.pairs.caption={txt: 1, json.title: 1}",
        "'title'",
        "set data.train.pairs.caption",
    ),
    "micro-batch does not divide": ("trainer.micro_batch_size=5", "trainer.micro_batch_size is 5", "divisor of the 16"),
    "directory that cannot be written": ("run.dir=/proc/run", "run.dir is '/proc/run'", "choose another folder"),
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES.values(), ids=WRONG_OVERRIDES)
def test_wrong_override_is_answered_in_one_line(override: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=1steps", override[0])
    assert_refused(finished, *override[1:])
    assert not (tmp_path / "run" / "config.yaml").exists(), "what is refused must not claim the directory"


def test_ill_typed_mask_ratio_is_answered_in_one_line(pairs: Path, tmp_path: Path) -> None:
    finished = runs.train(tmp_path, f"data.root={pairs}", "objective=[infonce,mae]", "objective.mae.mask_ratio=abc")
    assert_refused(finished, "objective.mae.mask_ratio is 'abc'", "expected float | ")


WRONG_EXPERIMENTS = {
    "trainer's key": ("trainer: {batchsize: 3}", "'trainer.batchsize'", "did you mean 'batch_size'?"),
    "group's name": ("trainr: {batch_size: 3}", "'trainr'", "did you mean 'trainer'?"),
    "ill-typed value": ("trainer: {max_bad_steps: many}", "trainer.max_bad_steps", "'many'", "Integer"),
    "objective's argument": (
        "defaults: [{override /objective: [mae]}]\nobjective: {mae: {mask_ration: 0.5}}",
        "'objective.mae.mask_ration'",
        "did you mean 'mask_ratio'?",
    ),
    "objective's name": ("defaults: [{override /objective: [mea]}]", "no objective 'mea'", "did you mean 'mae'?"),
    "schedule's argument": ("schedule: {warmpu: 5steps}", "'schedule.warmpu'", "did you mean 'warmup'?"),
    "evaluator's argument": ("eval: {retrieval: {evry: 5steps}}", "'eval.retrieval.evry'", "did you mean 'every'?"),
    "YAML itself": ("trainer: [1", "wrong.yaml", "line 2"),
}


@pytest.mark.parametrize("experiment", WRONG_EXPERIMENTS.values(), ids=WRONG_EXPERIMENTS)
def test_typo_in_an_experiment_is_answered_in_one_line(
    experiment: tuple[str, ...], pairs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "conf" / "experiment" / "wrong.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{experiment[0]}\n")
    finished = runs.train(
        tmp_path, f"data.root={pairs}", f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=wrong"
    )
    assert_refused(finished, *experiment[1:])


def test_a_mask_that_hides_nothing_is_refused(pairs: Path, tmp_path: Path) -> None:
    settings = ("objective=[mae]", *runs.TINY_MAE, "eval=[]", "objective.mae.mask_ratio=0.001")
    assert_refused(runs.train(tmp_path, f"data.root={pairs}", *settings), "mask_ratio is 0.001", "hides none")


def test_streams_and_held_out_sets_are_added_on_the_command_line(pairs: Path, tmp_path: Path) -> None:
    added = (
        "+data.train.photos.shards=train",
        "+data.train.photos.batch_size=8",
        "+data.train.photos.transform={_target_: mmpretrain.data.transforms.CenterCrop}",
        "+data.val.again.shards=val",
        "+data.val.again.caption=txt",
    )
    # Whichever objective comes first, the run is measured in pairs.
    settings = ("objective=[mae,infonce]", "objective.mae.stream=photos", *runs.TINY_MAE, "trainer.duration=1steps")
    finished = runs.train(tmp_path, f"data.root={pairs}", *settings, *added)
    assert finished.code == 0, finished.stderr
    results = runs.results(tmp_path / "run")
    assert results["samples"] == 16
    assert results["eval-again/image_retrieval_recall@1"] == results["eval-val/image_retrieval_recall@1"]


def test_the_command_line_goes_before_schedules_and_sizes_of_yamls(pairs: Path, tmp_path: Path) -> None:
    """A schedule is replaced, not merged with the breakpoints that are there; a part's values go before those of a size."""
    given = (
        "objective=[flip,mae]", "size=tiny_heads", "trainer.duration=1steps", "eval=[]",
        "objective.infonce.mask_ratio={linear: {0%: 0.25, 50%: 0}}", "objective.mae={decoder_width: 64, decoder_heads: 2}",
    )  # fmt: skip
    finished = runs.train(tmp_path, f"data.root={pairs}", *given)
    assert finished.code == 0, finished.stderr
    objective = config_yaml.from_yaml((tmp_path / "run" / "config.yaml").read_text())["objective"]
    assert objective["infonce"]["mask_ratio"] == {"linear": {"0%": 0.25, "50%": 0}}
    assert [objective["mae"][key] for key in ("decoder_width", "decoder_depth", "decoder_heads")] == [64, 2, 2]


def test_captions_are_generated_within_a_short_context(pairs: Path, tmp_path: Path) -> None:
    small = ("objective.captioning.decoder_depth=1", "objective.captioning.decoder_heads=2")
    settings = ("objective=[coca]", *small, "trainer.duration=1steps", "trainer.diagnose_every=1steps", "eval=[]")
    finished = runs.train(tmp_path, f"data.root={pairs}", *settings)  # of 16 tokens
    assert finished.code == 0, finished.stderr
    assert (tmp_path / "run" / "pictures" / "objectives.captioning.png").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.infonce.weight={linear: {0%: 0, 100%: 1}}"], ("nothing would be trained at sample 0", "weight 0")),
        (["objective.infonce.weight={piecewise: {0%: 1, 20steps: 0}}"], ("nothing would be trained at sample 320",)),
        (
            ["trainer.freeze={text: 2steps}", "objective=[causal_lm]"],
            ("nothing would be trained at sample 0",),
        ),
        (
            ["objective=[mae]", "objective.mae.stream=texts", "data.train.texts.shards=train"],
            ("data.train.texts.transform is null, but an objective reads the stream's images",),
        ),
        (
            ["objective=[infonce,mlm]", "objective.mlm.stream=images", "data.train.images.shards=train"],
            ("data.train.images.caption is null, but an objective reads the stream's texts",),
        ),
        (["objective=[mlm,captioning]", "objective.captioning.decoder_heads=2"], ("needs a causal", "leave out mlm")),
    ],
)
def test_what_cannot_be_trained_is_refused(
    overrides: list[str], expected: tuple[str, ...], pairs: Path, tmp_path: Path
) -> None:
    settings = ("trainer.duration=40steps", "eval=[]")
    assert_refused(runs.train(tmp_path, f"data.root={pairs}", *settings, *overrides), *expected)


def test_multirun_may_stand_behind_an_option_with_a_value() -> None:
    given = ["--config-dir", "conf", "experiment=mine", "-m", "checkpoint='a'", "+data.val.mine.shards=x"]
    assert hydra_arguments(given) == [
        "-m", "--config-dir", "conf", "experiment=mine", "checkpoint='a'", "+data.val={mine: {shards: x}}",
    ]  # fmt: skip


def test_schedules_may_be_swept_over() -> None:
    schedule = "{linear: {0%: 0, 20%: 0.1}}"
    assert hydra_arguments([f"objective.mae.weight={schedule},0.1", "-m"]) == [
        "-m",
        f"objective.mae.weight='{schedule}',0.1",
    ]
    assert hydra_arguments([f"a.b=0,{schedule}"]) == [f"a.b=0,'{schedule}'"]


def test_options_may_stand_anywhere(pairs: Path, tmp_path: Path) -> None:
    settings = (f"data.root={pairs}", "trainer.duration=1steps", "eval=[]", "run.dir=null", "objective=infonce,sigmoid")
    finished = runs.train(tmp_path, *settings[:3], "-m", *settings[3:])
    assert finished.code == 0, finished.stderr
    assert len(list((tmp_path / "runs").glob("*/*/results.json"))) == 2


def test_a_damaged_tar_is_named_at_the_start(pairs: Path, tmp_path: Path) -> None:
    whole = (pairs / "train" / "000000.tar").read_bytes()
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(whole[: len(whole) // 2])
    settings = ("trainer.duration=1steps", "eval=[]", f"data.train.pairs.shards={damaged}")
    finished = runs.train(tmp_path, f"data.root={pairs}", *settings)
    assert finished.code == 0, finished.stderr
    assert "damaged.tar: truncated" in finished.stderr


def test_texts_longer_than_the_tokenizer_makes_them_are_refused(pairs: Path, tmp_path: Path) -> None:
    finished = runs.trained(tmp_path, pairs, "trainer.duration=1steps", "data.train.pairs.text_length=17", code=2)
    assert "data.train.pairs.text_length is 17, but the tokenizer cuts texts to 16 tokens" in finished.errors[0]
    longest = "data.train.pairs.text_length={piecewise: {0%: 8, 50%: 16}}"
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", longest, "eval=[]")


def test_another_optimiser_replaces_that_of_an_experiment(pairs: Path, tmp_path: Path) -> None:
    own = [override for override in runs.TINY_RUN if not override.startswith("experiment=")]
    settings = [*own, f"data.root={pairs}", "experiment=emoji_clip", "optimizer=timm", "optimizer.name=lion"]
    finished = runs.run("mmpretrain.train", [*settings, "trainer.duration=1steps", "eval=[]"], tmp_path)
    assert finished.code == 0, finished.stderr


def test_empty_shard_is_answered_in_one_line(pairs: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.tar"
    tarfile.open(empty, "w").close()
    finished = runs.train(tmp_path, f"data.root={pairs}", f"data.train.pairs.shards={empty}")
    assert_refused(finished, "data.train.pairs.shards", "empty.tar", "no sample in it", "build it again")


def test_images_alone_need_no_text_encoder(pairs: Path, tmp_path: Path) -> None:
    without_text = [override for override in runs.TINY_RUN if not override.startswith(("model.text.", "eval="))]
    small = ("model.image.name=vit_tiny_patch16_224", "model.image.args.patch_size=8", "model.image.init=timm")
    settings = [*without_text, *small, *runs.TINY_MAE, f"data.root={pairs}", "trainer.duration=1steps"]
    settings += ["experiment=mae_b16", "data.train.images.shards=train", "schedule.warmup=0steps"]
    finished = runs.run("mmpretrain.train", [*settings, "eval=[projector]"], tmp_path)
    assert finished.code == 0, finished.stderr
    (projected,) = (tmp_path / "run" / "tensorboard").rglob("tensors.tsv")
    finished = runs.run("mmpretrain.train", [*settings, "eval=[retrieval]", "run.dir=other"], tmp_path)
    assert_refused(finished, "eval.retrieval embeds images and texts, but model.text is null", "eval=[]")

    embed = ["checkpoint=run", "device=cpu", "workers=0", "output=out", f"images={pairs}/val", "batch_size=256"]
    finished = runs.run("mmpretrain.embed", embed, tmp_path)
    assert finished.code == 0, finished.stderr
    np.testing.assert_allclose(np.loadtxt(projected), np.load(tmp_path / "out" / "images.npy"), atol=1e-5)
    (tmp_path / "texts.txt").write_text("a text\n")
    finished = runs.run("mmpretrain.embed", [*embed, "texts=texts.txt"], tmp_path)
    assert_refused(finished, "texts is 'texts.txt', but the model has no text encoder; leave texts out")


def test_batch_that_does_not_divide_over_the_ranks_ends_all_of_them(pairs: Path, tmp_path: Path) -> None:
    first, second = runs.train_group(tmp_path, 2, f"data.root={pairs}", "trainer.batch_size=15")
    assert_refused(first, "trainer.batch_size is 15", "multiple of the 2 processes")
    assert (second.code, second.stderr) == (2, ""), "one line, however many processes"


def test_multirun_under_torchrun_is_answered_in_one_line(pairs: Path, tmp_path: Path) -> None:
    environment = runs.group(2)[0]
    finished = runs.train(tmp_path, f"data.root={pairs}", "run.seed=0,1", "-m", environment=environment)
    assert_refused(finished, "-m (multirun)", "without torchrun")


def test_other_configuration_in_a_runs_directory_is_refused_with_the_difference(pairs: Path, tmp_path: Path) -> None:
    overrides = (f"data.root={pairs}", "trainer.duration=1steps")
    assert runs.train(tmp_path, *overrides).code == 0
    finished = runs.train(tmp_path, *overrides, "optimizer.lr=5e-4", "objective.infonce.weight=2")
    assert_refused(finished, "optimizer.lr: 0.001 -> 0.0005", "objective.infonce.weight: 1.0 -> 2", "run.name=")


def test_directory_in_use_is_refused_until_its_process_is_killed(pairs: Path, tmp_path: Path) -> None:
    overrides = (f"data.root={pairs}", "schedule=constant", "checkpoint.every=1steps", "data.workers=2")
    running = runs.start_train(tmp_path, *overrides, "trainer.duration=100ksteps")
    running.wait_for(lambda: len(runs.checkpoints(tmp_path / "run")) > 1, "a checkpoint beyond the first step")
    assert_refused(runs.train(tmp_path, *overrides, "trainer.duration=100ksteps"), "run is in use", "run.name")

    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    # The loader's workers outlive a kill by some seconds: they must not hold the directory.
    finished = runs.train(tmp_path, *overrides, "trainer.duration=1steps")
    assert_refused(finished, "trainer.duration ends at step 1", "expected at least")


@pytest.mark.slow
def test_a_fresh_interpreter_answers_in_one_line_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmpretrain.train", "trainer.batchsize=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert finished.stderr == "error: unknown configuration key 'trainer.batchsize'; did you mean 'batch_size'?\n"


@pytest.mark.slow
def test_torchrun_trains(pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mmpretrain.train"]
    command += [*runs.TINY_RUN, f"data.root={pairs}", "trainer.duration=2steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert runs.results(tmp_path / "run")["steps"] == 2


# ---------------------------------------------------------------------------------------------- one's own objective

SECTION = "## To add an objective"
OVERRIDES = ("objective=[infonce,agreement]", "hydra.searchpath=[file://my_conf]")


def follow_the_readme(folder: Path) -> dict[str, str]:
    """Write the files that the README's recipe names; the environment that its command sets."""
    section = README.read_text().split(SECTION)[1].split("\n## ")[0]
    files = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, flags=re.DOTALL))
    assert sorted(path.rpartition(".")[2] for path in files) == ["py", "yaml"]
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    assert "PYTHONPATH=. python -m mmpretrain.train" in section
    assert all(override in section for override in OVERRIDES)
    return {"PYTHONPATH": "."}


def test_the_readmes_objective_in_a_folder_of_ones_own_trains(pairs: Path, tmp_path: Path) -> None:
    environment = follow_the_readme(tmp_path)
    finished = runs.train(
        tmp_path, f"data.root={pairs}", "trainer.duration=12steps", *OVERRIDES, environment=environment
    )
    assert finished.code == 0, finished.stderr
    steps = [record for record in runs.records(tmp_path / "run") if "train/loss" in record]
    first, last = steps[0], steps[-1]
    assert first["train/loss"] == pytest.approx(first["train/infonce_loss"] + first["train/agreement_loss"])
    assert last["train/agreement_loss"] < 0.9 * first["train/agreement_loss"]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("objective.agreement.wieght=1", ("'objective.agreement.wieght'", "did you mean 'weight'?")),
        ("+objective.agreement.striim=x", ("'objective.agreement.striim'", "did you mean 'stream'?")),
        ("+objective.agreement.stream=5", ("objective.agreement.stream is 5", "expected str")),
    ],
)
def test_an_objective_of_ones_own_is_checked_like_the_others(
    override: str, fragments: tuple[str, str], pairs: Path, tmp_path: Path
) -> None:
    environment = follow_the_readme(tmp_path)
    finished = runs.train(tmp_path, f"data.root={pairs}", *OVERRIDES, override, environment=environment)
    assert_refused(finished, *fragments)


def test_the_readmes_python_finds_the_picture_that_a_caption_means(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=8epochs", "run.dir=runs/quickstart/default")
    assert finished.code == 0, finished.stderr
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("one", "red"), ("two", "blue")):
        (photos / f"{name}.png").write_bytes(runs.png(7, colour))
    (example,) = re.findall(r"```python\n(from pathlib.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["a red circle -> one.png", "a blue square -> two.png"]


# ---------------------------------------------------------------------------------------------- names and sweeps

# The tiny model as an experiment of the user's, so that the names of its runs are made of few overrides.
EXPERIMENT = """# @package _global_
defaults:
  - override /model: clip_tiny
  - override /eval: []
trainer: {duration: 2steps, batch_size: 16, device: cpu, precision: fp32, log_every: 1steps}
data: {root: ROOT, workers: 0}
model:
  embed_dim: 16
  image: {image_size: 32, args: {embed_dim: 32, depth: 1, num_heads: 2}}
  text: {width: 32, depth: 1, num_heads: 2, context_length: 16}
"""


def train_experiment(folder: Path, pairs: Path, *overrides: str) -> runs.Finished:
    """`experiment=tiny` on `pairs` with nothing but `overrides`."""
    path = folder / "conf" / "experiment" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EXPERIMENT.replace("ROOT", str(pairs)))
    search_path = f"hydra.searchpath=[file://{folder}/conf]"
    return runs.run("mmpretrain.train", [*overrides, search_path, "experiment=tiny"], folder)


def names(folder: Path) -> list[str]:
    """The runs of `experiment=tiny`."""
    return sorted(path.name for path in (folder / "runs" / "tiny").iterdir())


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "default"),
        (("run.seed=1", "optimizer.lr=1e-3"), "optimizer.lr=0.001,run.seed=1"),
        (("objective=[infonce,sigmoid]",), "objective=infonce+sigmoid"),
    ],
)
def test_a_runs_name_is_readable(overrides: tuple[str, ...], name: str, pairs: Path, tmp_path: Path) -> None:
    assert train_experiment(tmp_path, pairs, *overrides).code == 0
    assert names(tmp_path) == [name]


def test_what_may_change_on_a_resume_is_not_in_the_name(pairs: Path, tmp_path: Path) -> None:
    free = ("data.workers=1", "trainer.log_every=2steps", "trainer.micro_batch_size=8", "checkpoint.keep_last=1")
    assert train_experiment(tmp_path, pairs, "run.seed=1").code == 0
    again = train_experiment(tmp_path, pairs, *free, "run.seed=1")
    assert again.code == 0, again.stderr
    assert "is finished" in again.stderr
    assert names(tmp_path) == ["run.seed=1"]


def test_long_names_are_cut_and_stay_different(pairs: Path, tmp_path: Path) -> None:
    common = ("optimizer.weight_decay=0.123456", "optimizer.eps=1.0e-7", "objective.infonce.max_logit_scale=99.5")
    for seed in (1, 2):
        assert train_experiment(tmp_path, pairs, *common, f"run.seed={seed}").code == 0
    first, second = names(tmp_path)
    assert first != second
    assert len(first) == len(second) == 80
    assert first.startswith("objective.infonce.max_logit_scale=99.5,optimizer.eps=1e-07,")


def test_a_sweep_runs_each_job_in_a_directory_of_its_own(pairs: Path, tmp_path: Path) -> None:
    sweep = ("-m", "objective=infonce,sigmoid")
    finished = train_experiment(tmp_path, pairs, *sweep)
    assert finished.code == 0, finished.stderr
    assert names(tmp_path) == ["objective=infonce", "objective=sigmoid"]
    for name, loss in (("objective=infonce", "train/infonce_loss"), ("objective=sigmoid", "train/sigmoid_loss")):
        folder = tmp_path / "runs" / "tiny" / name
        assert runs.results(folder)["steps"] == 2
        assert [loss in record for record in runs.records(folder)] == [True, True]
    assert not (tmp_path / "multirun.yaml").exists()

    again = train_experiment(tmp_path, pairs, *sweep)
    assert again.code == 0, again.stderr
    assert again.stderr.count("is finished") == 2


def test_a_sweep_over_data_has_a_run_for_each(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "more").symlink_to(pairs)
    finished = train_experiment(tmp_path, pairs, "-m", "data.root=more,./more")
    assert finished.code == 0, finished.stderr
    assert names(tmp_path) == ["data.root=._more", "data.root=more"]


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local"))]
)
def test_a_job_that_is_refused_does_not_keep_a_sweep_from_the_others(
    launcher: str, pairs: Path, tmp_path: Path
) -> None:
    """Its one line names the job, and stands on the stderr of the command wherever the launcher runs the job."""
    finished = train_experiment(tmp_path, pairs, "-m", f"sweep={launcher}", "optimizer.lr=fast,1e-3")
    assert finished.code == 2, finished.stderr
    (line,) = finished.errors
    assert line.startswith("error: optimizer.lr is 'fast'; expected float: optimizer.lr=... (job 0: ")
    assert "optimizer.lr=fast" in line.partition("(job 0: ")[2]
    assert "Error executing job" not in finished.stderr and "Traceback" not in finished.stderr
    assert runs.results(tmp_path / "runs" / "tiny" / "optimizer.lr=0.001")["steps"] == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.train.pairs.source={path: a}", "AttributeError"),
        ("eval=[{_target_: a.B}]", "TypeError"),
        ("optimizer.groups.foo=1", "ValueError"),
    ],
)
def test_overrides_that_hydra_fails_on_are_one_line(override: str, reason: str, tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", [override], tmp_path)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: {override}: these overrides cannot be composed ({reason}: "), line


def test_a_launcher_that_cannot_start_jobs_is_one_line(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", ["-m", "sweep=slurm"], tmp_path, {"PATH": ""})  # without srun
    assert finished.code == 1
    (line,) = finished.errors
    assert line.startswith('error: the launcher of the jobs failed (RuntimeError: Could not detect "srun"'), line
    assert "Traceback" not in finished.stderr
