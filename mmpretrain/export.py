"""Write a checkpoint for another library: python -m mmpretrain.export checkpoint=RUN_DIR format=open_clip output=DIR."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mmpretrain import errors, files, optim
from mmpretrain.checkpoints import onnx_graphs, open_clip, store, timm_folder, torch_programs
from mmpretrain.checkpoints.exported import Exported, Exporter
from mmpretrain.checkpoints.hugging_face import export as hugging_face
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.config import command_line
from mmpretrain.config.schema import ExportConfig
from mmpretrain.reporting import model_card
from mmpretrain.reporting.evaluations import Weights

_FORMATS: Mapping[str, Exporter | None] = {
    "open_clip": open_clip.export,
    "huggingface": hugging_face.export,
    "timm": timm_folder.export,
    "onnx": onnx_graphs.export,
    "torch_export": torch_programs.export,
    "card": None,  # the model card alone
}


@command_line.command("export")
def main(cfg: ExportConfig) -> None:
    """Run the command."""
    with errors.usage_errors():
        run(cfg)


def run(cfg: ExportConfig) -> list[Path]:
    """Write a checkpoint in `cfg.format` with a model card. All files appear at the end, and none is overwritten.

    Returns: paths of the files.
    Raises: ValueError for a usage error.
    """
    if cfg.format not in _FORMATS:
        raise ValueError(f"format is {cfg.format!r}; {errors.nearest(cfg.format, list(_FORMATS))}")
    folder = Path(cfg.output).absolute()
    with _output_errors(cfg.output):
        _check_absent(folder, [model_card.FILE])
    loaded = load_checkpoint(cfg.checkpoint, trust=cfg.trust, ema=cfg.ema)
    partial = folder.with_name(f"{files.PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    with _output_errors(cfg.output):
        partial.mkdir(parents=True)
    try:
        exporter = _FORMATS[cfg.format]
        exported = None if exporter is None else exporter(loaded, partial)
        files.write_text(partial / model_card.FILE, _card(cfg, loaded, exported))
        names = sorted(path.name for path in partial.iterdir())
        with _output_errors(cfg.output):
            _check_absent(folder, names)
            _move(partial, folder, names)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    written = [Path(cfg.output) / name for name in names]
    for file in written:
        Console(markup=False, emoji=False).print(str(file), soft_wrap=True)
    return written


@contextmanager
def _output_errors(output: str) -> Iterator[None]:
    """Convert an OSError of making the output's folder to a ValueError, without the temporary folder's name."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"output is {output!r}, which cannot be written ({error.strerror}); expected a folder that can be made or written"
        ) from error


def _check_absent(folder: Path, names: list[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {str(folder)!r}, a file; expected a folder")
    if present := [name for name in names if (folder / name).exists()]:
        raise ValueError(f"output={folder} has a {present[0]} already; expected another folder, or remove the file")


def _move(partial: Path, folder: Path, names: list[str]) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    for name in names:
        (partial / name).rename(folder / name)


def _card(cfg: ExportConfig, loaded: Loaded, exported: Exported | None) -> str:
    model = loaded.model
    towers = {"image": model.image, "text": model.text}
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[optim.tower_of(f"model.{name}")] += parameter.numel()
    subject = model_card.Subject(
        source=str(loaded.folder),
        towers=tuple(name for name, tower in towers.items() if tower is not None),
        weights=None if loaded.checkpoint is None else Weights(loaded.checkpoint.name, loaded.manifest, cfg.ema),
        parameters=parameters,
        library=None if exported is None else exported.library,
        usage=None if exported is None else exported.usage,
    )
    state: dict[str, Any] = {} if loaded.checkpoint is None else store.load_state(loaded.checkpoint)
    return model_card.model_card(subject, loaded.folder, state)


if __name__ == "__main__":
    main()
