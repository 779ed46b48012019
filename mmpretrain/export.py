"""Write a checkpoint for another library: python -m mmpretrain.export checkpoint=RUN_DIR format=open_clip output=DIR."""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from mmpretrain import errors
from mmpretrain.checkpoints import open_clip
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import command_line, resolve
from mmpretrain.config.schema import ExportConfig

_FORMATS = {"open_clip": open_clip.export}


def main() -> None:
    """Run the command."""
    command_line.entry("export", _hydra_main)


@hydra.main(version_base="1.3", config_path="pkg://mmpretrain.conf", config_name="export")
def _hydra_main(cfg: DictConfig) -> None:
    with command_line.job(), errors.usage_errors():
        settings: ExportConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
        resolve.check_known(settings)
        run(settings)


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
