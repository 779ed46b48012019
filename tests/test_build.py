"""What a configuration is built into, and what is refused in which words, without a command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from mmpretrain import build, build_evaluation
from mmpretrain.batch import Samples
from mmpretrain.config import resolve
from mmpretrain.config.schema import EvalSetConfig, SourceConfig, SplitConfig, TrainConfig, register_schemas
from mmpretrain.data.classes import Classes
from mmpretrain.data.order import step_positions
from mmpretrain.data.stream import SampleStream
from mmpretrain.errors import UsageError
from mmpretrain.evals.embeddings import EvalSet
from mmpretrain.objectives.classification import Classification
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.schedules import Clock, Duration, TrainingProgress
from mmpretrain.training.task import Task
from tests import runs
from tests.data.test_files import write_image
from tests.data.test_wds_folder import write_folder
from tests.tars import encode, smooth_pixels, write_tar

SMALL_SIMCLR = ("objective.simclr.hidden_width=8", "objective.simclr.embed_dim=4")
Weights = Mapping[str, torch.Tensor]


def configuration(pairs: Path, *overrides: str) -> TrainConfig:
    """The checked configuration of the tiny model."""
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        cfg = compose("train", [*runs.TINY_RUN, f"data.root={pairs}", "trainer.duration=1steps", *overrides])
    return resolve.resolve(cfg)


@pytest.fixture(scope="module")
def cfg(pairs: Path) -> TrainConfig:
    """The configuration of InfoNCE on `pairs`; not to be changed."""
    return configuration(pairs)


@pytest.fixture(scope="module")
def task(cfg: TrainConfig) -> Task:
    """The task of `cfg`; not to be changed."""
    return build.build_task(cfg)[0]


def refused(cfg: TrainConfig, task: Task | None = None) -> str:
    """What is said of a configuration whose streams cannot be built."""
    with pytest.raises(ValueError, match=r".") as raised:
        build.build_streams(cfg, task or build.build_task(cfg)[0])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def first_samples(cfg: TrainConfig, task: Task) -> Samples:
    """The first two samples of the pairs."""
    stream = build.build_streams(cfg, task)["pairs"]
    item = step_positions(stream.order, range(2), 0, 1, 1)[0]
    return stream.read(item, build.build_tokenizer(cfg.data.tokenizer, task), TrainingProgress())[0]


# ---------------------------------------------------------------------------------------------- device


def test_the_device_is_the_one_named_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.device_of("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert build.device_of("auto") == torch.device("cpu")
        with pytest.raises(
            ValueError, match=r"^trainer\.device is 'cuda', but torch sees no GPU; .* trainer\.device=cpu$"
        ):
            build.device_of("cuda", "trainer.device")
    with pytest.raises(ValueError, match=r"^trainer\.device is 'tpu'; expected auto, cpu or cuda$"):
        build.device_of("tpu", "trainer.device")
    # A machine with GPUs, as torch would report it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        ValueError,
        match=r"^3 processes were started on a machine with 2 GPUs; .* lower --nproc-per-node .* --gpus-per-node",
    ):
        build.device_of("cuda")
    assert build.device_of("cpu") == torch.device("cpu")


def test_a_task_of_srun_uses_the_one_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine with one GPU, as torch would report it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert build.device_of("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun in a task of srun
    with pytest.raises(ValueError, match=r"^8 processes were started on a machine with 1 GPUs; "):
        build.device_of("cuda")


# ---------------------------------------------------------------------------------------------- task


def test_objectives_come_with_their_weights_and_without_those_of_weight_0(pairs: Path) -> None:
    cfg = configuration(
        pairs,
        "objective=[infonce,sigmoid,mae]",
        *runs.TINY_MAE,
        "objective.sigmoid.weight=0",
        "objective.mae.weight=0.25",
    )
    task, weights = build.build_task(cfg)
    assert list(task.objectives) == list(weights) == ["infonce", "mae"]
    assert isinstance(task.objectives["infonce"], InfoNCE) and isinstance(task.objectives["mae"], MAE)
    assert (weights["infonce"].values, weights["mae"].values) == ([1.0], [0.25])


def test_a_task_without_an_objective_is_refused(pairs: Path) -> None:
    for overrides in (("objective.infonce.weight=0",), ("objective=[]",)):
        with pytest.raises(
            ValueError, match=r"^no objective has a weight above 0; name at least one: objective=\[infonce\]$"
        ):
            build.build_task(configuration(pairs, *overrides))


def test_first_weights_depend_on_the_seed_and_the_parts_own_name_alone(pairs: Path, task: Task) -> None:
    def weights(*overrides: str) -> Weights:
        return build.build_task(configuration(pairs, *overrides))[0].state_dict()

    mae = ("objective=[mae]", *runs.TINY_MAE)
    both, alone = weights("objective=[infonce,mae]", *runs.TINY_MAE), weights(*mae)
    for name, tensor in [*task.state_dict().items(), *alone.items()]:
        assert torch.equal(both[name], tensor), name
    other = weights(*mae, "run.seed=1")
    for name in ("model.image.trunk.blocks.0.attn.qkv.weight", "model.text.token_embedding.weight",
                 "objectives.mae.mask_token"):  # fmt: skip
        assert not torch.equal(other[name], alone[name]), name


OWN = """
from torch import nn


class Plain(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.streams = ("pairs",)

    def count(self, batch): ...
    def loss(self, encodings): ...


class Named(Plain):
    def __init__(self, model, config_path: str) -> None:
        super().__init__(model)
        self.path = config_path


class Misspelt(Plain):
    def after_stp(self, model, progress, skipped): ...


class Failing(Plain):
    def __init__(self, model) -> None:
        raise ValueError("the model is too small")
"""


def test_an_objective_gets_the_model_and_its_own_key_if_it_asks_for_it(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objectives_of_test_build.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def built(kind: str) -> Any:
        target = f"{{_target_: objectives_of_test_build.{kind}}}"
        return build.build_task(configuration(pairs, f"+objective.own={target}"))[0].objectives["own"]

    assert built("Named").path == "objective.own"
    assert not hasattr(built("Plain"), "path")
    with pytest.raises(ValueError, match=r"^objective\.own: Misspelt\.after_stp is no hook .* did you mean after_step"):
        built("Misspelt")
    with pytest.raises(UsageError, match=r"^objective\.own: the model is too small$"):
        built("Failing")


# ---------------------------------------------------------------------------------------------- streams


def test_streams_are_those_that_objectives_read_and_the_pairs_come_first(pairs: Path) -> None:
    cfg = configuration(
        pairs, "objective=[mae,infonce]", *runs.TINY_MAE, "objective.mae.stream=images",
        "data.train.images.shards=train", "data.train.images.batch_size=4",
    )  # fmt: skip
    streams = build.build_streams(cfg, build.build_task(cfg)[0])
    assert {name: stream.batch_size.values for name, stream in streams.items()} == {"pairs": [16], "images": [4]}
    assert list(streams) == ["pairs", "images"]
    pairs_alone = build.build_streams(cfg, build.build_task(configuration(pairs))[0])
    assert list(pairs_alone) == ["pairs"], "what no objective reads is not opened"


def test_views_are_read_for_an_objective_alone(pairs: Path) -> None:
    """Those that objective=simclr adds to the stream cost nothing where its weight is 0."""
    for weight, num_views in ((1.0, 2), (0.0, 0)):
        cfg = configuration(pairs, "objective=[infonce,simclr]", *SMALL_SIMCLR, f"objective.simclr.weight={weight}")
        task, _ = build.build_task(cfg)
        views = first_samples(cfg, task).views
        assert len(cfg.data.train["pairs"].views) == 2
        assert (0 if views is None else views.shape[1]) == num_views


def test_a_stream_that_is_not_configured_is_named_with_those_that_are(pairs: Path) -> None:
    message = refused(configuration(pairs, "objective.infonce.stream=photos"))
    assert message.startswith("an objective reads stream 'photos'; expected data.train.photos (there is: pairs")
    assert message.endswith("): +data.train.photos.shards=...")


def test_the_first_stream_has_the_batch_size_of_the_trainer(pairs: Path) -> None:
    assert refused(configuration(pairs, "data.train.pairs.batch_size=8")) == (
        "data.train.pairs.batch_size is 8, but trainer.batch_size = 16 is that of pairs; expected the same: leave "
        "data.train.pairs.batch_size null"
    )


SOURCES = ("data.train.pairs.shards=null", "+data.train.pairs.sources={a: {shards: train}}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.pairs.shards=null"], "data.train.pairs has none of them; expected one of shards, source and sources: "),
        (["+data.train.pairs.sources={a: {shards: train}}"], "data.train.pairs has shards and sources; expected one"),
        (
            [*SOURCES, "data.train.pairs.subset=x.npy"],
            "data.train.pairs.subset is 'x.npy' beside sources; expected it where the samples are: "
            "data.train.pairs.sources.<source>.subset",
        ),
        (
            [*SOURCES, "data.train.pairs.max_samples=9"],
            "data.train.pairs.max_samples is 9 beside sources; expected it where the samples are",
        ),
        (["data.train.pairs.shards=[train,5]"], "data.train.pairs.shards is ['train', 5]; expected a tar, a folder"),
        (
            ["data.train.pairs.shards=null", "+data.train.pairs.sources={a: {shards: nowhere}}"],
            "data.train.pairs.sources.a.shards (data.root=",
        ),
        (
            ["data.train.pairs.image_size={piecewise: {0%: 32, 50%: 4}}"],
            "data.train.pairs.image_size has 4, which model.image cannot take (",
        ),
        (["data.train.pairs.transform.scale=[0.8,2]"], "data.train.pairs.transform: scale is"),
    ],
)  # fmt: skip
def test_a_stream_that_cannot_be_built_is_refused_in_one_line(
    overrides: list[str], message: str, task: Task, pairs: Path
) -> None:
    assert refused(configuration(pairs, *overrides), task).startswith(message)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("image_size=16", "16"), ("text_length=8", "8"), ("repeat_batches=2", "2"), ("group=caption", "'caption'"),
        ("views=[{transform: {_target_: mmpretrain.data.transforms.CenterCrop}}]", "[{'transform': "),
        ("label=cls", "'cls'"), ("shots=5", "5"), ("episodes.ways=4", "4"),
    ],
)  # fmt: skip
def test_what_noise_cannot_have_is_refused(override: str, value: str, task: Task, pairs: Path) -> None:
    message = refused(configuration(pairs, "data=synthetic", f"data.train.pairs.{override}"), task)
    assert message.startswith(f"data.train.pairs.{override.partition('=')[0]} is {value}")
    assert message.endswith("but noise has none; expected it left out, or data=pairs")


def test_noise_has_the_size_of_the_model_and_the_seed_of_the_run(pairs: Path) -> None:
    found = []
    for seed in (7, 7, 8):
        cfg = configuration(pairs, "data=synthetic", f"run.seed={seed}")
        images = first_samples(cfg, build.build_task(cfg)[0]).images
        assert images is not None and images.shape == (2, 3, 32, 32)
        found.append(images)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_first_samples_may_be_all(pairs: Path) -> None:
    cfg = configuration(pairs, "data.train.pairs.max_samples=48")
    stream = build.build_streams(cfg, build.build_task(cfg)[0])["pairs"]
    assert isinstance(stream, SampleStream)
    assert stream.order.num_samples == 48


def test_a_root_that_was_never_made_says_what_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(configuration(Path("data/shapes"))).endswith(
        "; mmpretrain-data shapes --output data/shapes makes it"
    )
    assert "makes it" not in refused(configuration(Path("data/others")))


# ---------------------------------------------------------------------------------------------- tokenizer


def test_a_tokenizer_that_does_not_fit_an_objective_is_refused(pairs: Path) -> None:
    """Objectives see the tokenizer: MLM needs a row for its mask token."""
    cfg = configuration(pairs, "objective=[mlm]", "model.text.vocab_size=49408")
    with pytest.raises(
        ValueError, match=r"^objective\.mlm has id 49407 as its mask token, .* model\.text\.vocab_size=49409$"
    ):
        build.build_tokenizer(cfg.data.tokenizer, build.build_task(cfg)[0])


def test_a_tokenizer_that_does_not_fit_the_text_encoder_is_refused(pairs: Path) -> None:
    cfg = configuration(pairs, "model.text.vocab_size=100")
    with pytest.raises(ValueError, match=r"model\.text\.vocab_size is 100"):
        build.build_tokenizer(cfg.data.tokenizer, build.build_task(cfg)[0])


# ---------------------------------------------------------------------------------------------- evaluation


def test_held_out_sets_are_opened_with_their_captions_checked(cfg: TrainConfig, task: Task, pairs: Path) -> None:
    def sets(**parts: Any) -> dict[str, Any]:
        given = {"a": EvalSetConfig(**{"shards": "val", "caption": "txt", **parts})}
        return build_evaluation.build_eval_sets(given, str(pairs), task.model, cfg.data.max_image_bytes, cfg.data)

    assert list(sets()) == ["a"]
    for parts, message in (
        ({"shards": "nope.tar"}, r"^data\.val\.a\.shards \(data\.root=.*nope\.tar"),
        ({"shards": 5}, r"^data\.val\.a\.shards is 5; expected a tar, a folder or a pattern, or a list of them$"),
        ({"caption": "json"}, r"^data\.val\.a\.caption is 'json'"),
        ({"caption": "json.title"}, r"'title'.*data\.val\.a\.caption"),
    ):
        with pytest.raises(ValueError, match=message):
            sets(**parts)


def test_classes_without_a_list_are_those_that_the_sources_name(cfg: TrainConfig, task: Task, tmp_path: Path) -> None:
    for image in ("train/wild_cat/a", "train/dog/a", "val/dog/a", "val/ant/a"):
        write_image(tmp_path / f"{image}.png", 0)
    source = {"_target_": "mmpretrain.data.files.FileSource"}

    def held_out(**parts: Any) -> EvalSet:
        data = EvalSetConfig(source={**source, "path": "val"}, templates=["my {}"], **parts)
        sets = build_evaluation.build_eval_sets(
            {"a": data}, str(tmp_path), task.model, cfg.data.max_image_bytes, cfg.data
        )
        return sets["a"]

    assert held_out(label="cls").classes == Classes(["ant", "dog"], [["my ant"], ["my dog"]])
    assert held_out().classes is None
    train = SplitConfig(source={**source, "path": "train"})
    expected = Classes(["ant", "dog", "wild_cat"], [["my ant"], ["my dog"], ["my wild cat"]])
    assert held_out(label="json.label", train=train).classes == expected
    with pytest.raises(ValueError, match=r"^data\.val\.a\.label is 'cls'.*, such as 'ant', .*label=json\.<column>"):
        held_out(label="cls", train=train)


def test_a_folder_of_clip_benchmark_is_a_held_out_set(cfg: TrainConfig, task: Task, tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "wds_a", 0, classnames="cat\ndog\n", zeroshot_classification_templates="a photo of a {c}.\n"
    )
    (folder / "test" / "nshards.txt").write_text("1")
    write_tar(folder / "test" / "0.tar", [{"png": encode(smooth_pixels(9, 9)), "cls": "1"}])
    given = {"a": EvalSetConfig(wds="wds_a")}
    found = build_evaluation.build_eval_sets(given, str(tmp_path), task.model, cfg.data.max_image_bytes, cfg.data)["a"]
    assert found.classes == Classes(["cat", "dog"], [["a photo of a cat."], ["a photo of a dog."]])
    assert (found.label, found.shards.num_samples, found.train) == ("cls", 1, None)


def test_evaluators_have_intervals_of_their_own_or_the_trainers() -> None:
    target = "mmpretrain.evals.retrieval.Retrieval"
    evaluators, every = build_evaluation.build_evaluators(
        {"a": {"_target_": target, "every": "5steps", "ks": [1]}, "b": {"_target_": target, "every": None}}, "2epochs"
    )
    assert every == {"a": Duration.parse("5steps", "a"), "b": Duration.parse("2epochs", "b")}
    assert list(evaluators) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^eval\.c\.every is 'often'"):
        build_evaluation.build_evaluators({"c": {"_target_": target, "every": "often"}}, "2epochs")
    with pytest.raises(UsageError, match=r"^eval\.c: ks is 0; expected a number at least 1"):
        build_evaluation.build_evaluators({"c": {"_target_": target, "ks": [0]}}, "2epochs")


# ---------------------------------------------------------------------------------------------- labels


CLASSIFICATION = ("objective=[classification]", "data.train.pairs.caption=null", "data.train.pairs.label=json.label")


def test_class_folders_name_the_classes_of_a_run(pairs: Path, tmp_path: Path) -> None:
    for name in ("red_fox/a.png", "red_fox/b.png", "elk/c.png"):
        write_image(tmp_path / name, 0)
    cfg = configuration(pairs, *CLASSIFICATION, "data.train.pairs.shards=null")
    cfg.data.train["pairs"].source = {"_target_": "mmpretrain.data.files.FileSource", "path": str(tmp_path)}
    task, _ = build.build_task(cfg)
    objective = task.objectives["classification"]
    assert isinstance(objective, Classification) and objective.class_names == ["elk", "red_fox"]
    labels = first_samples(cfg, task).labels
    assert labels is not None and set(labels.tolist()) <= {0, 1}


def test_numbers_of_classes_mean_the_same_in_all_sources(pairs: Path, tmp_path: Path) -> None:
    for name in ("a/cat/0.png", "a/dog/0.png", "b/cat/0.png", "b/elk/0.png"):
        write_image(tmp_path / name, 0)
    cfg = configuration(
        pairs, *CLASSIFICATION, "objective.classification.num_classes=3", "data.train.pairs.shards=null"
    )
    target = {"_target_": "mmpretrain.data.files.FileSource"}
    cfg.data.train["pairs"].sources = {
        name: SourceConfig(source={**target, "path": str(tmp_path / name)}, weight=1.0) for name in ("a", "b")
    }
    cfg.data.train["pairs"].label = "cls"
    assert refused(cfg).startswith("data.train.pairs.label is 'cls', the number of a class, but the sources have other")


def test_images_are_mixed_only_for_objectives_that_know_it(pairs: Path) -> None:
    mixup = ("augmentation=mixup", "data.train.pairs.label=json.label", "eval=[]")
    assert refused(configuration(pairs, *mixup)).startswith(
        "data.train.pairs.mix mixes images of different samples, which objective.infonce does not know; expected"
    )


def test_episodes_leave_samples_to_classify(pairs: Path) -> None:
    cfg = configuration(
        pairs, "objective=[prototypical]", "data.train.pairs.label=json.label", "objective.prototypical.shots=8",
        "data.train.pairs.episodes={ways: 2, per_class: 8}",
    )  # fmt: skip
    assert refused(cfg).startswith(
        "objective.prototypical.shots is 8, but data.train.pairs.episodes has 8 samples of each class, of which none"
    )


def test_a_few_shots_of_each_class_are_a_run_of_their_own(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\ngrey\n")
    classes = f"data.train.pairs.classes={tmp_path}/classes.txt"
    cfg = configuration(pairs, *CLASSIFICATION, classes, "data.train.pairs.shots=3")
    task, _ = build.build_task(cfg)
    stream = build.build_streams(cfg, task)["pairs"]
    assert stream.order.num_samples == 12
    other = configuration(pairs, *CLASSIFICATION, classes, "data.train.pairs.shots=3", "run.seed=1")
    assert build.build_streams(other, task)["pairs"].fingerprints != stream.fingerprints


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data.train.pairs.label=null", "data.train.pairs.shots=3"),
            "shots is 3 of each class, but the stream has no label",
        ),
        (("data.train.pairs.classes=nothing.tsv",), "nothing.tsv', which is no file"),
        ((), "the number of classes is not known; set data.train.pairs.classes"),
    ],
)
def test_what_lacks_labels_or_classes_is_refused(pairs: Path, overrides: tuple[str, ...], message: str) -> None:
    known = () if not overrides else ("objective.classification.num_classes=4",)
    with pytest.raises(ValueError, match=r".") as raised:
        cfg = configuration(pairs, *CLASSIFICATION, *known, *overrides)
        build.build_streams(cfg, build.build_task(cfg)[0])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_held_out_data_of_a_run_without_evaluators_may_be_missing(pairs: Path) -> None:
    cfg = configuration(pairs, "data.val.val.shards=nothing", "eval=[]")
    task, _ = build.build_task(cfg)
    tokenizer = build.build_tokenizer(cfg.data.tokenizer, task)
    clock = Clock(16, 200, 16)
    evaluation = build_evaluation.build_evaluation(cfg, task, tokenizer, clock, torch.device("cpu"))
    assert not evaluation.is_due(16)
