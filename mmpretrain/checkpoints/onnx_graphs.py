"""Export to ONNX: image.onnx and text.onnx."""

import logging
import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from mmpretrain.checkpoints.exported import Exported
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.checkpoints.programs import INPUTS, describe, programs_of

_MAX_FILE_BYTES = 2_000_000_000  # a protobuf holds 2 GiB; weights beyond that lie in a second file


def export(loaded: Loaded, folder: Path) -> Exported:
    """Write an .onnx for each tower, export.json and the files of preprocessing.

    A tower of more than 2 GB has its weights in an .onnx.data beside it.

    Raises: ValueError if a package is missing, or a tower cannot be traced or has an operator that ONNX lacks.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, which format=onnx needs; pip install 'multimodal-pretrain[onnx]'"
        ) from error
    programs = programs_of(loaded.model)
    for name, program in programs.items():
        _write(name, program, folder / f"{name}.onnx")
    loads = "\n".join(f'{name} = onnxruntime.InferenceSession("DIR/{name}.onnx")' for name in programs)
    feeds = {name: ", ".join(f'"{each}": {each}' for each in INPUTS[name]) for name in programs}
    calls = "\n".join(f"{name}.run(None, {{{feed}}})[0]" for name, feed in feeds.items())
    return Exported(
        "onnx",
        f"""\
```python
import onnxruntime
{loads}
{calls}
```
{describe(loaded, folder, "onnx")}""",
    )


def _write(name: str, program: ExportedProgram, path: Path) -> None:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    loggers = [logging.getLogger(each) for each in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, output_names=[f"{name}_embeds"],
                external_data=num_bytes > _MAX_FILE_BYTES,
                dynamic_shapes={key: {0: "batch"} for key in INPUTS[name]},
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"torch.onnx cannot export model.{name}: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
