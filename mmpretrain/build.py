"""Construction of a run's task, streams and tokenizer from its configuration."""

import inspect
from typing import Any

import numpy as np
import torch

from mmpretrain import distributed
from mmpretrain.build_data import build_classes, build_samples, build_source, check_class_numbers, named_classes
from mmpretrain.checkpoints.loaded import fit_tokenizer
from mmpretrain.config import instantiate
from mmpretrain.config.schema import StreamConfig, TrainConfig
from mmpretrain.data.classes import Classes
from mmpretrain.data.open_shards import StorageOptions
from mmpretrain.data.source import class_names_of, selected
from mmpretrain.data.stream import SampleStream, Source, Stream
from mmpretrain.data.subset import draw_shots
from mmpretrain.data.synthetic import SyntheticStream
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.launchers import has_own_gpu
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import add_adapters
from mmpretrain.objectives.base import check_objective, hooks_of
from mmpretrain.objectives.prototypical import Prototypical
from mmpretrain.schedules import ScheduledValue
from mmpretrain.seeds import torch_seed
from mmpretrain.training.task import Task


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
        if {"classes", "stream"} <= parameters.keys():
            stream = node.get("stream", parameters["stream"].default)
            runtime["classes"] = _classes(stream, cfg.data.train.get(stream, StreamConfig()), cfg.data.root)
        objectives[name] = instantiate.instantiate(node, cfg.run.seed, path, **runtime)
        check_objective(objectives[name], path, model)
    return Task(model, objectives), weights


def build_streams(cfg: TrainConfig, task: Task) -> dict[str, Stream]:
    """Build the streams that the objectives read: `pairs` first, then in the order of `data.train`.

    The first stream has the batch size `trainer.batch_size` and defines the samples of durations.

    Raises: ValueError if a stream is not configured or lacks shards, or if the first one has another batch size.
    """
    model = task.model
    model_size = 1 if model.image is None else model.image.image_size  # no objective reads images without an encoder
    for name in task.streams:
        if name not in cfg.data.train:
            known = ", ".join(cfg.data.train) or "none"
            raise ValueError(
                f"an objective reads stream {name!r}; expected data.train.{name} (there is: {known}): "
                f"+data.train.{name}.shards=..."
            )
    _check_queries(cfg, task)
    _check_mixed(cfg, task)
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
            keys = ("image_size", "text_length", "repeat_batches", "group", "views", "label", "mix", "shots")
            given = {key: getattr(stream, key) for key in keys} | {"episodes.ways": stream.episodes.ways}
            for key, value in given.items():
                if value:
                    raise ValueError(
                        f"data.train.{name}.{key} is {value!r}, but noise has none; expected it left out, or data=pairs"
                    )
            streams[name] = SyntheticStream(
                name, batch_size, cfg.run.seed, model_size, model.num_channels, **stream.synthetic
            )
            continue
        classes = _classes(name, stream, cfg.data.root)
        streams[name] = SampleStream(
            name=name,
            sources=_sources(name, stream, cfg.data.root, cfg.data, classes, cfg.run.seed),
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
            classes=classes,
            mix=instantiate.instantiate(stream.mix, cfg.run.seed, f"data.train.{name}.mix"),
            episodes=(stream.episodes.ways, stream.episodes.per_class) if stream.episodes.ways else None,
        )
        streams[name].check_first_sample()
        if model.image is not None and stream.transform is not None and stream.image_size is not None:
            _check_image_sizes(model, ScheduledValue(stream.image_size, f"data.train.{name}.image_size"))
    return streams


def _check_queries(cfg: TrainConfig, task: Task) -> None:
    """Raises: ValueError for episodes in which no sample of a class is left to be classified."""
    for key, objective in task.objectives.items():
        if not isinstance(objective, Prototypical):
            continue
        for name in objective.streams:
            episodes = cfg.data.train[name].episodes
            if episodes.ways and objective.shots >= episodes.per_class:
                raise ValueError(
                    f"objective.{key}.shots is {objective.shots}, but data.train.{name}.episodes has {episodes.per_class} "
                    f"samples of each class, of which none is left to be classified; expected fewer shots, or "
                    f"data.train.{name}.episodes.per_class={2 * objective.shots}"
                )


def _check_mixed(cfg: TrainConfig, task: Task) -> None:
    """Raises: ValueError if an objective reads mixed images as if they were of one sample each."""
    for key, objective in task.objectives.items():
        for name in objective.streams:
            if cfg.data.train[name].mix is not None and not hooks_of(objective).reads_mixed:
                raise ValueError(
                    f"data.train.{name}.mix mixes images of different samples, which objective.{key} does not know; expected "
                    f"data.train.{name}.mix=null, or objective=classification alone"
                )


def _classes(name: str, stream: StreamConfig, root: str) -> Classes | None:
    """Return the classes of a stream: those of its class list, or else those that its source names. Raises: ValueError."""
    if stream.classes is not None or stream.source is None or stream.label is None:
        return build_classes(stream, root)
    source = build_source(stream.source, f"data.train.{name}.source", root)
    names = class_names_of(source)
    return named_classes(names, stream.templates) if names else None


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


def _sources(
    name: str,
    stream: StreamConfig,
    root: str,
    storage: StorageOptions,
    classes: Classes | None = None,
    seed: int = 0,
) -> list[Source]:
    """Open the sources of a stream; `seed` draws its shots. Raises: ValueError if they are not given as they must be."""
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
        samples = build_samples(f"data.train.{name}", stream.shards, stream.source, root, storage, stream.subset)
        if stream.max_samples is not None:
            samples = selected(samples, np.arange(min(stream.max_samples, samples.num_samples)))
        if stream.shots is not None:
            if stream.label is None:
                raise ValueError(
                    f"data.train.{name}.shots is {stream.shots} of each class, but the stream has no label; set "
                    f"data.train.{name}.label"
                )
            try:
                samples = selected(samples, draw_shots(samples, stream.label, classes, stream.shots, seed))
            except ValueError as error:
                raise ValueError(f"data.train.{name}.shots: {error}") from error
        return [Source(name, samples)]
    sources = [
        Source(
            source_name,
            build_samples(
                f"data.train.{name}.sources.{source_name}", source.shards, source.source, root, storage, source.subset
            ),
            source.weight,
        )
        for source_name, source in stream.sources.items()
    ]
    if stream.label is not None:
        check_class_numbers(
            f"data.train.{name}.label", stream.label, [class_names_of(each.samples) for each in sources]
        )
    return sources


def build_tokenizer(node: instantiate.Node, task: Task) -> Tokenizer:
    """Build the tokenizer of `data.tokenizer`. Raises: ValueError if it does not fit the text encoder or an objective."""
    tokenizer: Tokenizer = instantiate.instantiate(node, 0, "data.tokenizer")
    if task.model.text is not None:
        fit_tokenizer(tokenizer, task.model.text)
    for objective in task.objectives.values():
        hooks_of(objective).set_tokenizer(tokenizer)
    return tokenizer
