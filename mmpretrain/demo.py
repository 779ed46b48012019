"""Show a checkpoint on a local web page: python -m mmpretrain.demo checkpoint=RUN_DIR images=FOLDER_OR_TARS."""

import logging
import os
import signal
import threading

from mmpretrain import build, build_data, build_evaluation, errors
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import command_line
from mmpretrain.config.schema import DemoConfig, Precision
from mmpretrain.evals.base import Context
from mmpretrain.evals.embeddings import EvalSet
from mmpretrain.interactive.abilities import abilities_of
from mmpretrain.interactive.server import check_installed, served
from mmpretrain.training.precision import autocast

log = logging.getLogger("mmpretrain.demo")  # __name__ is __main__ in the command, which logs only warnings

_INTERRUPTED_EXIT_CODE = 130


@command_line.command("demo")
def main(cfg: DemoConfig) -> None:
    """Run the command."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("mmpretrain").setLevel(logging.INFO)
    # So that temporary files are removed. SIGINT, too: a shell's background jobs begin with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with errors.usage_errors():
            run(cfg)
    except KeyboardInterrupt:  # before the page is there
        raise SystemExit(_INTERRUPTED_EXIT_CODE) from None


def run(cfg: DemoConfig) -> None:
    """Serve the page until SIGINT or SIGTERM. Raises: ValueError for a usage error."""
    check_installed()
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"{world_size} processes were started; expected one: leave out torchrun")
    errors.check_number("port", cfg.port, at_least=1, at_most=65535)
    errors.check_number("batch_size", cfg.batch_size, at_least=1)
    errors.check_number("workers", cfg.workers, at_least=0)
    device = build.device_of(cfg.device)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    sets = {}
    if cfg.images is not None:
        images = build_data.build_images(cfg.images, cfg.storage)
        log.info("embedding %d images, unless they were embedded before", images.num_samples)
        sets["images"] = EvalSet("images", images, loaded.preprocess, key="images")
    context = Context(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        sets=sets,
        logit_scale=loaded.scalars.get("logit_scale"),
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        autocast=autocast(device, precision),
        cache=build_evaluation.build_cache(cfg.cache, loaded, precision),
    )
    abilities = abilities_of(loaded, context)
    with served(str(loaded.folder), abilities, cfg.host, cfg.port) as address:
        log.info("%s    Ctrl-C ends it", address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("ending")


if __name__ == "__main__":
    main()
