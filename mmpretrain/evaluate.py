"""Evaluate a checkpoint: python -m mmpretrain.evaluate checkpoint=RUN_DIR eval=[retrieval,zero_shot] [overrides]."""

import json
import logging
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmpretrain import build, distributed, errors, files
from mmpretrain.checkpoints import untrusted
from mmpretrain.checkpoints.load import Loaded, checked, load_checkpoint
from mmpretrain.config import checks, command_line
from mmpretrain.config.schema import EvalSetConfig, EvaluateConfig, Precision
from mmpretrain.data.decode import MAX_IMAGE_BYTES
from mmpretrain.evals.base import Context, chosen_sets, evaluate
from mmpretrain.reporting.progress import print_results
from mmpretrain.training.precision import autocast

log = logging.getLogger(__name__)


@command_line.command("evaluate")
def main(cfg: EvaluateConfig) -> None:
    """Run the command."""
    with errors.usage_errors():
        checks.check_evaluators(cfg.eval)
        for name, data in cfg.data.val.items():
            checks.check_source(data.source, f"data.val.{name}.source")
        run(cfg)


def run(cfg: EvaluateConfig) -> Mapping[str, float]:
    """Evaluate a checkpoint on the given data sets, or else on the run's own. Raises: ValueError for a usage error."""
    device = build.device_of(cfg.device)
    distributed.setup(device)
    if cfg.output is not None and not Path(cfg.output).parent.is_dir():
        raise ValueError(f"output is {cfg.output!r}; expected a file in a folder that exists: make it first")
    checks.check_evaluate_ranges(cfg)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    sets = cfg.data.val or _sets_of_run(loaded)
    lookup = None if cfg.data.val else untrusted.lookup(untrusted.SOURCES, cfg.trust, untrusted.SOURCE_MEMBERS)
    root = cfg.data.root or loaded.setting("data.root", str)
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    batch_size = cfg.data.val_batch_size or loaded.setting("data.val_batch_size", int)
    errors.check_number("config.yaml: data.val_batch_size", batch_size, at_least=1)
    max_image_bytes = loaded.setting("data.max_image_bytes", int | None) or MAX_IMAGE_BYTES  # missing in older runs
    index_dir = cfg.data.index_dir or loaded.setting("data.index_dir", str | None)
    storage = replace(cfg.data, index_dir=index_dir)
    context = Context(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        sets=build.build_eval_sets(sets, root, loaded.model, max_image_bytes, storage, lookup),
        logit_scale=loaded.scalars.get("logit_scale"),
        batch_size=batch_size,
        workers=cfg.data.workers,
        autocast=autocast(device, precision),
    )
    evaluators, _ = build.build_evaluators(cfg.eval, "1steps")
    idle = [name for name, evaluator in evaluators.items() if not chosen_sets(name, evaluator, context)]
    if idle and distributed.is_main():
        log.warning(
            "eval: %s find no data set with what they need, such as a caption, or a label and classes; they "
            "give no score",
            ", ".join(idle),
        )
    scores = evaluate(evaluators, context)
    if not (scores or context.shown.pictures or context.shown.projections):
        raise ValueError(
            f"no evaluation of eval=[{','.join(evaluators)}] finds a data set that has what it needs; "
            "give one, such as +data.val.mine.shards=... with a caption, or a label and classes"
        )
    if distributed.is_main():
        results = {**scores, "samples": loaded.state.get("samples", 0)}
        if cfg.output is not None:
            files.write_text(Path(cfg.output), json.dumps(results, indent=2) + "\n")
        print_results(results, loaded.path.parent.parent)
    return scores


def _sets_of_run(loaded: Loaded) -> dict[str, EvalSetConfig]:
    """Return the data sets of the run's `data.val`. Paths of shards, sources and classes are not restricted."""
    annotations, sets = typing.get_type_hints(EvalSetConfig), {}
    for name, fields in loaded.setting("data.val", Mapping[str, Mapping]).items():
        for key, value in fields.items():
            if key not in annotations:
                raise ValueError(f"config.yaml: data.val.{name} has {key!r}; {errors.nearest(key, list(annotations))}")
            checked(value, f"data.val.{name}.{key}", annotations[key])
        sets[name] = EvalSetConfig(**fields)
    return sets


if __name__ == "__main__":
    main()
