"""Build of the library that lets fake CUDA tensors be used where there is no GPU (see cuda_stub.c)."""

import re
import subprocess
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("cuda_stub.c")


def cuda_runtime() -> Path | None:
    """Return the CUDA runtime library that this PyTorch has loaded; None if it was built without CUDA."""
    torch.cuda.is_available()
    maps = Path("/proc/self/maps").read_text()
    return next((Path(path) for path in re.findall(r"\S+/libcudart[^\s/]*\.so\S*", maps)), None)


def build(folder: Path, runtime: Path) -> Path:
    """Compile the library in a folder, with every function of the runtime that cuda_stub.c does not have."""
    source = _SOURCE.read_text()
    listed = subprocess.run(["nm", "-D", "--defined-only", runtime], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r" T (cuda\w+)", listed)) - set(re.findall(r"\b(cuda\w+)\(", source))
    rest = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    # The name under which PyTorch looks for the driver.
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{library.name}", "-o", library, "-ldl"],
        input=source + rest, text=True, check=True,
    )  # fmt: skip
    return library
