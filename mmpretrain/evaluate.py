"""Evaluate a checkpoint: python -m mmpretrain.evaluate checkpoint=RUN_DIR eval=[retrieval,zero_shot] [overrides]."""

import json
import logging
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpretrain import build, build_evaluation, distributed, errors, files
from mmpretrain.checkpoints import untrusted
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.checkpoints.loaded import Loaded, checked
from mmpretrain.config import checks, command_line, eval_sets
from mmpretrain.config.schema import EvalSetConfig, EvaluateConfig, Precision, SplitConfig
from mmpretrain.data.decode import MAX_IMAGE_BYTES
from mmpretrain.evals.base import Context, chosen_sets, evaluate, lacking_tower, needs_text
from mmpretrain.reporting import evaluations
from mmpretrain.reporting.progress import print_results
from mmpretrain.reporting.records import finite, intervals_of
from mmpretrain.scores import Score
from mmpretrain.training.precision import autocast

log = logging.getLogger(__name__)


@command_line.command("evaluate")
def main(cfg: EvaluateConfig) -> None:
    """Run the command."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("mmpretrain").setLevel(logging.INFO)
    with errors.usage_errors():
        checks.check_evaluators(cfg.eval)
        checks.check_eval_sources(cfg.data.val)
        run(cfg)


def run(cfg: EvaluateConfig) -> Mapping[str, Score]:
    """Evaluate a checkpoint on the given data sets, or else on the run's own. Raises: ValueError for a usage error."""
    device = build.device_of(cfg.device)
    distributed.setup(device)
    if cfg.output is not None and (not Path(cfg.output).parent.is_dir() or Path(cfg.output).is_dir()):
        raise ValueError(f"output is {cfg.output!r}; expected a file in a folder that exists: make it first")
    checks.check_evaluate_ranges(cfg)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    root = cfg.data.root or loaded.setting("data.root", str)
    given = eval_sets.with_suite(cfg.data.val, cfg.data.suite, root)
    sets = given or _sets_of_run(loaded)
    lookup = None if given else untrusted.lookup(untrusted.SOURCES, cfg.trust, untrusted.SOURCE_MEMBERS)
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    batch_size = cfg.data.val_batch_size or loaded.setting("data.val_batch_size", int)
    errors.check_number("config.yaml: data.val_batch_size", batch_size, at_least=1)
    max_image_bytes = loaded.setting("data.max_image_bytes", int | None) or MAX_IMAGE_BYTES  # missing in older runs
    index_dir = cfg.data.index_dir or loaded.setting("data.index_dir", str | None)
    storage = replace(cfg.data, index_dir=index_dir)
    context = Context(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        sets=build_evaluation.build_eval_sets(sets, root, loaded.model, max_image_bytes, storage, lookup),
        logit_scale=loaded.scalars.get("logit_scale"),
        batch_size=batch_size,
        workers=cfg.data.workers,
        autocast=autocast(device, precision),
        cache=build_evaluation.build_cache(cfg.cache, loaded, precision),
        build_objectives=lambda: loaded.objectives,
    )
    built, _ = build_evaluation.build_evaluators(cfg.eval, "1steps")
    # A model of one encoder is evaluated by those that need no other one; if there are none, each is refused below.
    evaluators = {name: each for name, each in built.items() if lacking_tower(each, loaded.model) is None} or built
    idle = {name: each for name, each in evaluators.items() if not chosen_sets(name, each, context)}
    needs = needs_text(idle)
    if len(idle) == len(evaluators):
        raise ValueError(
            f"no set of data.val has what eval needs: {needs}; give one with it: +data.val.mine.shards=..., "
            "+data.val.mine.label=... and so on"
        )
    if distributed.is_main():
        if len(evaluators) < len(built):
            others = ", ".join(name for name in built if name not in evaluators)
            log.warning("eval: %s give no score: the model lacks an encoder that they need", others)
        if idle:
            log.warning("eval: no set of data.val has what these need, which give no score: %s", needs)
    scores = evaluate(evaluators, context)
    if not (scores or context.shown.pictures or context.shown.projections):
        raise ValueError(
            f"eval=[{','.join(evaluators)}] gives no score on the sets of data.val; see what each leaves out"
        )
    if distributed.is_main():
        if loaded.checkpoint is not None:
            weights = evaluations.Weights(loaded.checkpoint.name, loaded.manifest, cfg.ema)
            sources = {name: data.shards for name, data in context.sets.items()}
            evaluations.keep(loaded.folder, weights, scores, sources, precision.value)
        results = {**scores, "samples": loaded.num_samples}
        intervals = intervals_of(scores)
        if cfg.output is not None:
            text = json.dumps({**finite(results), "intervals": intervals}, indent=2)
            files.write_text(Path(cfg.output), text + "\n")
        print_results(results, loaded.folder, intervals)
    return scores


def _sets_of_run(loaded: Loaded) -> dict[str, EvalSetConfig]:
    """Return the data sets of the run's `data.val`. Paths of shards, sources and classes are not restricted."""
    sets = {}
    for name, fields in loaded.setting("data.val", Mapping[str, Mapping]).items():
        split = SplitConfig(**_checked_fields(fields.get("train", {}), f"data.val.{name}.train", SplitConfig))
        rest = {key: value for key, value in fields.items() if key != "train"}
        sets[name] = EvalSetConfig(**_checked_fields(rest, f"data.val.{name}", EvalSetConfig), train=split)
    return sets


def _checked_fields(fields: Any, path: str, kind: type) -> Mapping[str, Any]:
    """Return the fields of a part of the run's configuration. Raises: ValueError if one is unknown or of another type."""
    annotations = typing.get_type_hints(kind)
    for key, value in checked(fields, path, Mapping[str, Any]).items():
        if key not in annotations:
            raise ValueError(f"config.yaml: {path} has {key!r}; {errors.nearest(key, list(annotations))}")
        checked(value, f"{path}.{key}", annotations[key])
    return typing.cast(Mapping[str, Any], fields)


if __name__ == "__main__":
    main()
