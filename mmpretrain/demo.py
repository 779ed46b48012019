"""Show a checkpoint on a local web page: python -m mmpretrain.demo checkpoint=RUN_DIR images=FOLDER_OR_TARS."""

import importlib.util
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mmpretrain import build, distributed, errors
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.config import command_line
from mmpretrain.config.schema import DemoConfig, Precision
from mmpretrain.evals.base import Context
from mmpretrain.evals.embeddings import EvalSet
from mmpretrain.evals.patch_similarity import embeds_patches
from mmpretrain.training.precision import autocast

log = logging.getLogger(__name__)

_MAX_UPLOAD_BYTES = 1 << 26
_INTERRUPTED_EXIT_CODE = 130


@command_line.command("demo")
def main(cfg: DemoConfig) -> None:
    """Run the command."""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("mmpretrain").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary files are removed then, too
    try:
        with errors.usage_errors():
            run(cfg)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED_EXIT_CODE) from None


def run(cfg: DemoConfig) -> None:
    """Serve the page until the process is interrupted. Raises: ValueError for a usage error."""
    _check(cfg)
    device = build.device_of(cfg.device)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    if loaded.preprocess is None:
        raise ValueError(
            f"{cfg.checkpoint}: the model has no image encoder, which each tab needs; expected one that has"
        )
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    sets = {}
    if cfg.images is not None:
        images = build.build_images(cfg.images, cfg.storage)
        sets["images"] = EvalSet("images", images, loaded.preprocess, key="images")
    context = Context(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        sets=sets,
        logit_scale=loaded.scalars.get("logit_scale"),
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        autocast=autocast(device, precision),
        cache=build.build_cache(cfg.cache, loaded, precision),
    )
    if sets:
        log.info("embedding %d images, if it was not done before", sets["images"].shards.num_samples)
        context.embedded("images")  # before there are threads: its workers are forked
    with _gradio_settings():
        _serve(cfg, loaded, context)


def _check(cfg: DemoConfig) -> None:
    """Raises: ValueError for a missing package and for wrong settings."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is not installed; pip install 'multimodal-pretrain[demo]'")
    if distributed.world_size() > 1:
        raise ValueError(f"{distributed.world_size()} processes were started; expected one: leave out torchrun")
    errors.check_number("port", cfg.port, at_least=1, at_most=65535)
    errors.check_number("batch_size", cfg.batch_size, at_least=1)
    errors.check_number("workers", cfg.workers, at_least=0)


@contextmanager
def _gradio_settings() -> Iterator[None]:
    """Let Gradio send nothing, reach this machine without a proxy, and keep uploads and pictures until the end only."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join([*([direct] if direct else []), "127.0.0.1", "localhost"])
    with tempfile.TemporaryDirectory(prefix="mmpretrain-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def _serve(cfg: DemoConfig, loaded: Loaded, context: Context) -> None:
    """Serve the page of a model until SIGINT or SIGTERM. Raises: ValueError if the port is in use."""
    from mmpretrain.interactive import page
    from mmpretrain.interactive.classification import Classifier
    from mmpretrain.interactive.search import ImageSearch

    assert loaded.preprocess is not None
    has_text, has_patches = loaded.model.text is not None, embeds_patches(loaded.model)
    absent = {
        "Search": (bool(context.sets), "images is not given"),
        "Zero-shot": (has_text, "the model has no text encoder"),
        "Words": (
            has_text and has_patches,
            "the image encoder has no patch tokens that are projected like its pooled token"
            if has_text
            else "the model has no text encoder",
        ),
    }
    for tab, (is_there, reason) in absent.items():
        if not is_there:
            log.info("no tab %s: %s", tab, reason)
    blocks = page.build(
        page.Page(
            title=str(loaded.folder),
            context=context,
            preprocess=loaded.preprocess,
            search=ImageSearch(context, "images") if context.sets else None,
            classifier=Classifier(context) if has_text else None,
            has_word_maps=has_text and has_patches,
        )
    )
    try:
        _, address, _ = blocks.launch(
            server_name=cfg.host, server_port=cfg.port, share=False, inbrowser=False, inline=False,
            prevent_thread_lock=True, quiet=True, show_error=True, footer_links=[], run_history=False, ssr_mode=False,
            pwa=False, mcp_server=False, enable_monitoring=False, num_workers=0, max_file_size=_MAX_UPLOAD_BYTES,
            theme=page.theme(),
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port {cfg.port} of {cfg.host} cannot be used; expected a free one: port=...") from error
    try:
        log.info("%s    Ctrl-C ends it", address)
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("ended")
    finally:
        blocks.server.force_exit = True  # an open page would hold it for five seconds
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
