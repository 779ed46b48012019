"""Export to files of torch.export: image.pt2 and text.pt2."""

from pathlib import Path

import torch

from mmpretrain.checkpoints.exported import Exported
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.checkpoints.programs import INPUTS, describe, programs_of


def export(loaded: Loaded, folder: Path) -> Exported:
    """Write a .pt2 for each tower, export.json and the files of preprocessing.

    Raises: ValueError if torch.export cannot trace a tower.
    """
    programs = programs_of(loaded.model)
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")
    loads = "\n".join(f'{name} = torch.export.load("DIR/{name}.pt2").module()' for name in programs)
    calls = "\n".join(f"{name}({', '.join(f'{each}={each}' for each in INPUTS[name])})" for name in programs)
    return Exported(
        "pytorch",
        f"""\
```python
import torch
{loads}
{calls}
```
{describe(loaded, folder, "pt2")}

Loading a .pt2 is not safe if others made it: it may run code.""",
    )
