r"""Run the benchmarks that fit two CPU cores, one after the other, in about 15 minutes.

    python -m analysis.benchmarks [--output bench] [--emoji data/emoji/train] [--photographs ../shared/data/grocery/images]

Each benchmark prints a table and writes JSON to the output folder; its --help describes the work and the checks of equality.
`train_vs_open_clip` is not included: it takes hours and needs open_clip's trainer in a separate environment.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


def commands(emoji: Path, photographs: Path) -> dict[str, list[str]]:
    """Return the arguments of each benchmark, starting with its module, by the name of its JSON file."""
    captions = str(emoji) if any(emoji.glob("*.tar")) else "24"
    vit = ["--model", "ViT-S-32-alt", "--batch", "32", "--captions", "16"]
    return {
        "order": ["order", "--rounds", "5"],
        "data": ["data", "--rounds", "5", *(["--photographs", str(photographs)] if photographs.exists() else [])],
        "step_emoji": [
            "step",
            "--model",
            "emoji_clip",
            "--batch",
            "128",
            "--captions",
            captions,
            "--rounds",
            "5",
            "--round-steps",
            "2",
        ],
        "step_vit": ["step", *vit, "--rounds", "5", "--round-steps", "1"],
        "patch_projection": ["patch_projection", "--rounds", "9"],
        "randomness": ["randomness", "--rounds", "3"],
        "packing": ["packing", "--captions", captions, "--rounds", "5"],
        "loss_memory": ["loss_memory", "--rounds", "5"],
        "grad_cache": ["grad_cache", "--image-size", "64"],
        "scaling": ["scaling", "--rounds", "1"],
        "evaluators": ["evaluators"],
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder of the JSON files")
    parser.add_argument(
        "--emoji", type=Path, default=Path("data/emoji/train"), help="tars of emoji; captions of 24 tokens without them"
    )
    parser.add_argument(
        "--photographs", type=Path, default=Path("../shared/data/grocery/images"), help="JPEGs; noise without them"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, arguments in commands(args.emoji, args.photographs).items():
        module, *rest = arguments
        print(f"\n=== {module} {' '.join(rest)}", flush=True)
        started = time.perf_counter()
        output = args.output / f"{name}.json"
        command = [sys.executable, "-m", f"analysis.benchmarks.{module}", *rest, "--output", str(output)]
        subprocess.run(command, check=True)
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
