"""Construction of evaluations from the configuration: data sets, evaluators, and their cache of embeddings."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from mmpretrain import files
from mmpretrain.build_data import build_classes, build_samples, check_class_numbers, named_classes
from mmpretrain.checkpoints.loaded import Loaded, preprocess_of
from mmpretrain.config import eval_sets, instantiate
from mmpretrain.config.schema import EvalSetConfig, Precision, SplitConfig, TrainConfig
from mmpretrain.data.classes import Classes
from mmpretrain.data.fields import check_caption_field
from mmpretrain.data.open_shards import StorageOptions
from mmpretrain.data.source import SampleSource, class_names_of
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.evals.base import Context, Evaluation, Evaluator, check_evaluator
from mmpretrain.evals.embedding_cache import EmbeddingCache
from mmpretrain.evals.embeddings import EvalSet, check_readable
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.schedules import Clock, Duration
from mmpretrain.training.precision import autocast
from mmpretrain.training.task import Task
from mmpretrain.training.workers import own_cores


def build_cache(folder: str, loaded: Loaded, precision: Precision) -> EmbeddingCache | None:
    """Return the cache of a model's embeddings: `auto` is the user's cache folder, and `none` keeps none."""
    if folder == "none":
        return None
    tokenizer = loaded.config["data"].get("tokenizer")
    model = f"{loaded.fingerprint} {precision.value} {json.dumps(tokenizer, sort_keys=True, default=str)}"
    return EmbeddingCache(files.user_cache("embeddings") if folder == "auto" else folder, model)


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
        return build_samples(key, data.shards, data.source, root, storage, lookup=lookup)

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
            sources=json.dumps([data.source, data.train.source], sort_keys=True, default=str),
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
        return build_classes(data, root)
    names, of_train = (class_names_of(each) for each in (samples, train or samples))
    if data.label is None or not names:
        return None
    check_class_numbers(f"{key}.label", data.label, [names, of_train])
    if of_train and of_train != names:
        names = sorted({*names, *of_train})
    return named_classes(names, data.templates)


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
