"""Write a checkpoint for another library: python -m mmpretrain.export checkpoint=RUN_DIR format=open_clip output=DIR."""

from pathlib import Path

from rich.console import Console

from mmpretrain import errors
from mmpretrain.checkpoints import open_clip
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import command_line
from mmpretrain.config.schema import ExportConfig

_FORMATS = {"open_clip": open_clip.export}


@command_line.command("export")
def main(cfg: ExportConfig) -> None:
    """Run the command."""
    with errors.usage_errors():
        run(cfg)


def run(cfg: ExportConfig) -> list[Path]:
    """Write a checkpoint in `cfg.format`, and return the paths of the files. Raises: ValueError for a usage error."""
    if cfg.format not in _FORMATS:
        raise ValueError(f"format is {cfg.format!r}; {errors.nearest(cfg.format, list(_FORMATS))}")
    loaded = load_checkpoint(cfg.checkpoint, trust=cfg.trust, ema=cfg.ema)
    files = _FORMATS[cfg.format](
        loaded.model, loaded.config["model"], loaded.scalars, Path(cfg.output), loaded.tokenizer
    )
    for file in files:
        Console(markup=False, emoji=False).print(str(file), soft_wrap=True)
    return files


if __name__ == "__main__":
    main()
