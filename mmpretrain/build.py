"""Construction of a run's parts from its configuration."""

import inspect
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpretrain import distributed, files
from mmpretrain.checkpoints.loaded import Loaded, fit_tokenizer, preprocess_of
from mmpretrain.config import checks, eval_sets, instantiate
from mmpretrain.config.instantiate import accepts, expected_type
from mmpretrain.config.schema import EvalSetConfig, LabelConfig, Precision, SplitConfig, StreamConfig, TrainConfig
from mmpretrain.data.classes import Classes, classes_named, read_classes
from mmpretrain.data.clip_prompts import PREFIX
from mmpretrain.data.fields import check_caption_field
from mmpretrain.data.image_folder import ImageFolder
from mmpretrain.data.open_shards import StorageOptions, open_shards
from mmpretrain.data.remote import is_remote
from mmpretrain.data.source import ClassifiedSource, SampleSource, selected
from mmpretrain.data.stream import SampleStream, Source, Stream
from mmpretrain.data.subset import draw_shots, select
from mmpretrain.data.synthetic import SyntheticStream
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.evals.base import Context, Evaluation, Evaluator, check_evaluator
from mmpretrain.evals.embedding_cache import EmbeddingCache
from mmpretrain.evals.embeddings import EvalSet, check_readable
from mmpretrain.launchers import has_own_gpu
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import add_adapters
from mmpretrain.objectives.base import check_objective, hooks_of
from mmpretrain.schedules import Clock, Duration, ScheduledValue
from mmpretrain.seeds import torch_seed
from mmpretrain.training.precision import autocast
from mmpretrain.training.task import Task
from mmpretrain.training.workers import own_cores

log = logging.getLogger(__name__)

_EMBEDDED = "data/shapes"  # default location of the generated shapes data set


def device_of(name: str, key: str = "device") -> torch.device:
    """Return this process's device for `auto`, `cpu` or `cuda`, given under `key`.

    Of several GPUs each process has the one of its local rank. A task of srun that sees one GPU has that one.

    Raises: ValueError for another name or too few GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{key} is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key} is 'cuda', but torch sees no GPU; expected one, or use {key}=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = distributed.local_rank(), torch.cuda.device_count()
    if distributed.local_world_size() > count:
        if not (count == 1 and has_own_gpu()):
            raise ValueError(
                f"{distributed.local_world_size()} processes were started on a machine with {count} GPUs; expected at most "
                f"one for each: lower --nproc-per-node (torchrun), raise --gpus-per-node (Slurm), or use {key}=cpu"
            )
        index = 0
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def build_task(cfg: TrainConfig) -> tuple[Task, dict[str, ScheduledValue]]:
    """Build the model with its objectives, and the objectives' weights. Objectives whose weight is always 0 are left out.

    Raises: ValueError if no objective remains.
    """
    model = instantiate.instantiate(cfg.model, cfg.run.seed, "model")
    if cfg.trainer.lora.rank:
        lora = cfg.trainer.lora
        with torch_seed(cfg.run.seed, "lora"):
            add_adapters(model, lora.rank, lora.alpha, lora.dropout, lora.targets)
    weights = {
        name: ScheduledValue(node.get("weight", 1.0), f"objective.{name}.weight", at_least=0)
        for name, node in cfg.objective.items()
    }
    weights = {name: weight for name, weight in weights.items() if max(weight.values) > 0}
    if not weights:
        raise ValueError("no objective has a weight above 0; name at least one: objective=[infonce]")
    objectives = {}
    for name in weights:
        node = {key: value for key, value in cfg.objective[name].items() if key != "weight"}
        path = f"objective.{name}"
        parameters = inspect.signature(instantiate.find(node["_target_"])).parameters
        runtime: dict[str, Any] = {"model": model}
        if "config_path" in parameters:
            runtime["config_path"] = path
        if "classes" in parameters:
            stream = node.get("stream", parameters["stream"].default)
            runtime["classes"] = _classes(cfg.data.train.get(stream, StreamConfig()), cfg.data.root)
        objectives[name] = instantiate.instantiate(node, cfg.run.seed, path, **runtime)
        check_objective(objectives[name], path, model)
    return Task(model, objectives), weights


def build_streams(cfg: TrainConfig, task: Task) -> dict[str, Stream]:
    """Build the streams that the objectives read: `pairs` first, then in the order of `data.train`.

    The first stream has the batch size `trainer.batch_size` and defines the samples of durations.

    Raises: ValueError if a stream is not configured or lacks shards, or if the first one has another batch size.
    """
    model = task.model
    classes = {name: _classes(stream, cfg.data.root) for name, stream in cfg.data.train.items()}
    model_size = 1 if model.image is None else model.image.image_size  # no objective reads images without an encoder
    for name in task.streams:
        if name not in cfg.data.train:
            known = ", ".join(cfg.data.train) or "none"
            raise ValueError(
                f"an objective reads stream {name!r}; expected data.train.{name} (there is: {known}): "
                f"+data.train.{name}.shards=..."
            )
    names = sorted((name for name in cfg.data.train if name in task.streams), key=lambda name: name != "pairs")
    streams: dict[str, Stream] = {}
    for name in names:
        stream = cfg.data.train[name]
        batch_size = cfg.trainer.batch_size if stream.batch_size is None else stream.batch_size
        if name == names[0] and batch_size != cfg.trainer.batch_size:
            raise ValueError(
                f"data.train.{name}.batch_size is {batch_size}, but trainer.batch_size = {cfg.trainer.batch_size} is that "
                f"of {name}; expected the same: leave data.train.{name}.batch_size null"
            )
        if stream.synthetic is not None:
            for key in ("image_size", "text_length", "repeat_batches", "group", "views", "label", "mix"):
                if getattr(stream, key):
                    raise ValueError(
                        f"data.train.{name}.{key} is {getattr(stream, key)!r}, but noise has none; expected it left out, or "
                        "data=pairs"
                    )
            streams[name] = SyntheticStream(
                name, batch_size, cfg.run.seed, model_size, model.num_channels, **stream.synthetic
            )
            continue
        streams[name] = SampleStream(
            name=name,
            sources=_sources(name, stream, cfg, classes[name]),
            batch_size=batch_size,
            seed=cfg.run.seed,
            caption=stream.caption,
            transform=instantiate.instantiate(stream.transform, cfg.run.seed, f"data.train.{name}.transform"),
            image_size=model_size if stream.image_size is None else stream.image_size,
            channels=model.num_channels,
            augment=instantiate.instantiate(stream.augment, cfg.run.seed, f"data.train.{name}.augment"),
            group=stream.group,
            views=[
                (view["transform"], view.get("augment") or ())
                for view in instantiate.instantiate(stream.views, cfg.run.seed, f"data.train.{name}.views")
            ][: task.num_views(name)],
            repeat_batches=stream.repeat_batches,
            text_length=stream.text_length,
            shorten=stream.shorten,
            max_image_bytes=cfg.data.max_image_bytes,
            shuffle=stream.shuffle,
            label=stream.label,
            classes=classes[name],
            mix=instantiate.instantiate(stream.mix, cfg.run.seed, f"data.train.{name}.mix"),
            episodes=(stream.episodes.ways, stream.episodes.per_class) if stream.episodes.ways else None,
        )
        streams[name].check_first_sample()
        if model.image is not None and stream.transform is not None and stream.image_size is not None:
            _check_image_sizes(model, ScheduledValue(stream.image_size, f"data.train.{name}.image_size"))
    return streams


@torch.no_grad()
def _check_image_sizes(model: ImageTextModel, sizes: ScheduledValue) -> None:
    """Run the image encoder on each size of a schedule. Raises: ValueError for a size that it does not accept."""
    encoder = model.image_encoder
    model.eval()
    for size in {int(value) for value in sizes.values}:
        try:
            encoder(torch.zeros(1, model.num_channels, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{sizes.name} has {size}, which model.image cannot take ({str(error).splitlines()[0]}); expected sizes "
                f"that it can, such as its own {encoder.image_size}; plain ViTs of timm take any from one patch on"
            ) from error
    model.train()


def _sources(name: str, stream: StreamConfig, cfg: TrainConfig, classes: Classes | None) -> list[Source]:
    root, storage = cfg.data.root, cfg.data
    given = [key for key in ("shards", "source", "sources") if getattr(stream, key)]
    if len(given) != 1:
        raise ValueError(
            f"data.train.{name} has {' and '.join(given) or 'none of them'}; expected one of shards, source and sources: "
            + (f"data.train.{name}.{given[0]}=null" if given else f"data.train.{name}.shards=...")
        )
    for key in ("subset", "max_samples", "shots"):
        if stream.sources and getattr(stream, key) is not None:
            raise ValueError(
                f"data.train.{name}.{key} is {getattr(stream, key)!r} beside sources; expected it where the samples are"
                + (f": data.train.{name}.sources.<source>.subset" if key == "subset" else "")
            )
    if not stream.sources:
        samples = _samples(f"data.train.{name}", stream.shards, stream.source, root, storage, stream.subset)
        if stream.max_samples is not None:
            samples = selected(samples, np.arange(min(stream.max_samples, samples.num_samples)))
        if stream.shots is not None:
            if stream.label is None:
                raise ValueError(
                    f"data.train.{name}.shots is {stream.shots} of each class, but the stream has no label; set "
                    f"data.train.{name}.label"
                )
            try:
                samples = selected(samples, draw_shots(samples, stream.label, classes, stream.shots, cfg.run.seed))
            except ValueError as error:
                raise ValueError(f"data.train.{name}.shots: {error}") from error
        return [Source(name, samples)]
    return [
        Source(
            source_name,
            _samples(
                f"data.train.{name}.sources.{source_name}", source.shards, source.source, root, storage, source.subset
            ),
            source.weight,
        )
        for source_name, source in stream.sources.items()
    ]


def build_source(
    node: instantiate.Node, key: str, root: str | None, lookup: instantiate.Lookup | None = None
) -> SampleSource:
    """Build the source of a `_target_` node; its argument `root`, if it has one, is the folder of relative paths.

    Args:
        node: the node, checked unless `lookup` is given.
        key: full name of the node.
        root: the configuration's data.root.
        lookup: lookup of an untrusted node; the node is checked after it.

    Raises: ValueError if `lookup` refuses the node, an argument is wrong, or what is built is no `SampleSource`.
    """
    resolved = instantiate.resolve(node, key, lookup or (lambda name, _: instantiate.find(name)))
    if lookup is not None:  # only now may the module of a `_target_` be imported
        checks.check_source(node, key)
    target = instantiate.find(node["_target_"])
    runtime = {"root": root} if "root" in inspect.signature(target).parameters else {}
    source = instantiate.call(resolved, 0, **runtime)
    if not isinstance(source, SampleSource):
        raise ValueError(
            f"{key} is a {type(source).__name__}; expected num_samples, fingerprint, key, location and read, as "
            f"{expected_type(SampleSource)} has them"
        )
    if source.num_samples < 1:
        raise ValueError(f"{key} has {source.num_samples} samples; expected at least one")
    return source


def build_images(images: str | Sequence[str] | dict[str, Any], storage: StorageOptions) -> SampleSource:
    """Open the images of a command's `images`: a folder of image files, tars, or the node of a source. A collective.

    Raises: ValueError for a folder without images, and for an unsuitable source.
    """
    if isinstance(images, dict):
        checks.check_source(images, "images")
        return build_source(images, "images", None)
    if isinstance(images, str) and Path(images).is_dir() and not any(Path(images).glob("*.tar")):
        return ImageFolder(images)
    return open_shards(images, None, storage)


def build_cache(folder: str, loaded: Loaded, precision: Precision) -> EmbeddingCache | None:
    """Return the cache of a model's embeddings: `auto` is the user's cache folder, and `none` keeps none."""
    if folder == "none":
        return None
    tokenizer = loaded.config["data"].get("tokenizer")
    model = f"{loaded.fingerprint} {precision.value} {json.dumps(tokenizer, sort_keys=True, default=str)}"
    return EmbeddingCache(files.user_cache("embeddings") if folder == "auto" else folder, model)


def _samples(
    key: str,
    shards: Any,
    source: instantiate.Node | None,
    root: str | None,
    storage: StorageOptions,
    subset: str | None = None,
    lookup: instantiate.Lookup | None = None,
) -> SampleSource:
    if (shards is None) == (source is None):
        has = "neither" if shards is None else "both"
        raise ValueError(f"{key} has {has} of shards and source; expected one of them: {key}.shards=... or .source=...")
    if source is not None:
        built = build_source(source, f"{key}.source", root, lookup)
        try:
            return built if subset is None else selected(built, select(built, subset))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return _shards(key, shards, root, storage, subset)


def _shards(
    key: str, shards: str | list[str], root: str | None, storage: StorageOptions, subset: str | None
) -> SampleSource:
    if not accepts(shards, str | Sequence[str]):
        raise ValueError(f"{key}.shards is {shards!r}; expected a tar, a folder or a pattern, or a list of them")
    try:
        opened = open_shards(shards, root, storage)
        if subset is not None and not opened.is_indexed:
            raise ValueError(
                f"subset is {subset!r}, but the shards have no indexes; expected them: python -m data_tools index"
            )
        kept: SampleSource = opened if subset is None else selected(opened, select(opened, subset))
    except ValueError as error:
        made = (
            f"; mmpretrain-data shapes --output {root} makes it"
            if root == _EMBEDDED and not Path(root).exists()
            else ""
        )
        raise ValueError(f"{key}.shards (data.root={root}): {error}{made}") from error
    if opened.problems:
        others = f", and {len(opened.problems) - 1} more such lines" if len(opened.problems) > 1 else ""
        log.warning("%s.shards: %s%s; `python -m data_tools index` names them all", key, opened.problems[0], others)
    return kept


def build_tokenizer(node: instantiate.Node, task: Task) -> Tokenizer:
    """Build the tokenizer of `data.tokenizer`. Raises: ValueError if it does not fit the text encoder or an objective."""
    tokenizer: Tokenizer = instantiate.instantiate(node, 0, "data.tokenizer")
    if task.model.text is not None:
        fit_tokenizer(tokenizer, task.model.text)
    for objective in task.objectives.values():
        hooks_of(objective).set_tokenizer(tokenizer)
    return tokenizer


def build_eval_sets(
    sets: Mapping[str, EvalSetConfig],
    root: str | None,
    model: ImageTextModel,
    max_image_bytes: int,
    storage: StorageOptions,
    lookup: instantiate.Lookup | None = None,
) -> dict[str, EvalSet]:
    """Build the held-out data sets with a model's preprocessing.

    Args:
        sets: configuration of each data set.
        root: folder of relative paths.
        model: model to evaluate.
        max_image_bytes: memory limit for decoding one image, in bytes.
        storage: indexes and cache of tars.
        lookup: lookup of the sources' `_target_`s in a configuration that is not trusted; None for a checked one.

    Raises: ValueError for missing shards, classes or fields, and for a source that `lookup` refuses.
    """
    sets = {name: eval_sets.expanded(data, f"data.val.{name}", root) for name, data in sets.items()}
    for name, data in sets.items():
        if data.caption is not None:
            check_caption_field(data.caption, f"data.val.{name}.caption")
        for field, path in data.fields.items():
            if not re.fullmatch(r"json(\.[^.]+)+", str(path)):
                raise ValueError(
                    f"data.val.{name}.fields.{field} is {path!r}; expected a field of json, such as json.{field}"
                )

    def samples_of(key: str, data: EvalSetConfig | SplitConfig) -> SampleSource:
        return _samples(key, data.shards, data.source, root, storage, lookup=lookup)

    built = {}
    for name, data in sets.items():
        key = f"data.val.{name}"
        samples = samples_of(key, data)
        has_train = data.train.shards is not None or data.train.source is not None
        train = samples_of(f"{key}.train", data.train) if has_train else None
        built[name] = EvalSet(
            name=name,
            shards=samples,
            preprocess=preprocess_of(model, max_image_bytes) if data.images else None,
            caption=data.caption,
            label=data.label,
            classes=_eval_classes(key, data, samples, train, root),
            fields=data.fields,
            train=train,
        )
    for eval_set in built.values():
        check_readable(eval_set)
    return built


def _eval_classes(
    key: str, data: EvalSetConfig, samples: SampleSource, train: SampleSource | None, root: str | None
) -> Classes | None:
    """Return the classes of a data set: those of its class list, or else those that its sources name.

    Raises: ValueError for a wrong class list, and if numbers mean other classes in the training split.
    """
    if data.classes is not None:
        return _classes(data, root)
    names, of_train = (
        each.class_names if isinstance(each, ClassifiedSource) else None for each in (samples, train or samples)
    )
    if data.label is None or not names:
        return None
    if of_train and of_train != names:
        if data.label == "cls":
            other = min(set(names) ^ set(of_train))
            raise ValueError(
                f"{key}.label is 'cls', the number of a class, but only one of both splits has class {other!r}; expected the "
                f"name of the class: {key}.label=json.<column>, such as json.label for class folders"
            )
        names = sorted({*names, *of_train})
    spoken = classes_named([name.replace("_", " ") for name in names], data.templates)
    return replace(spoken, names=names)


def _classes(data: LabelConfig, root: str | None) -> Classes | None:
    """Read the class list of a data set, if it has one. Raises: ValueError if it cannot be read."""
    if data.classes is None:
        return None
    return read_classes(_local(data.classes, root), data.class_column, data.text_column, data.templates)


def _local(classes: str, root: str | None) -> Path | str:
    """Return the path of a class list, or `clip:NAME` as it is. Raises: ValueError if it is remote."""
    if classes.startswith(PREFIX):
        return classes
    path = classes if is_remote(classes) else os.path.join(root or "", classes)
    if is_remote(path):
        raise ValueError(f"classes is {path!r}; expected a file of this machine: copy it, and give its absolute path")
    return Path(path)


def build_evaluators(nodes: Mapping[str, Any], default_every: str) -> tuple[dict[str, Evaluator], dict[str, Duration]]:
    """Build the evaluators, and return them with the interval of each. Raises: ValueError if one lacks a method."""
    evaluators, every = {}, {}
    for name, node in nodes.items():
        every[name] = Duration.parse(node.get("every") or default_every, f"eval.{name}.every")
        evaluators[name] = instantiate.instantiate({k: v for k, v in node.items() if k != "every"}, 0, f"eval.{name}")
        check_evaluator(evaluators[name], name)
    return evaluators, every


def build_evaluation(
    cfg: TrainConfig, task: Task, tokenizer: Tokenizer, clock: Clock, device: torch.device
) -> Evaluation:
    """Build a run's evaluation.

    Raises: ValueError if a data set cannot be read, or if an evaluator does not fit the model or the data sets.
    """
    evaluators, every = build_evaluators(cfg.eval, cfg.trainer.eval_every)
    context = Context(
        model=task.model,
        tokenizer=tokenizer,
        # Experiments without evaluators may lack held-out data.
        sets=build_eval_sets(
            cfg.data.val if cfg.eval else {}, cfg.data.root, task.model, cfg.data.max_image_bytes, cfg.data
        ),
        logit_scale=task.logit_scale,
        batch_size=cfg.data.val_batch_size,
        workers=own_cores() if cfg.data.workers == "auto" else cfg.data.workers,
        timeout_seconds=cfg.data.timeout_seconds,
        autocast=autocast(device, cfg.trainer.precision),
        build_objectives=lambda: task.objectives,
    )
    return Evaluation(evaluators, every, clock, context)
