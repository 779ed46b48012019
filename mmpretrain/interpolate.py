"""Interpolate checkpoints: python -m mmpretrain.interpolate checkpoints=[FIRST,SECOND] alpha=[0,.25,.5,.75,1] output=DIR."""

from pathlib import Path

from rich.console import Console

from mmpretrain import errors
from mmpretrain.checkpoints import interpolate
from mmpretrain.config import command_line
from mmpretrain.config.instantiate import accepts
from mmpretrain.config.schema import InterpolateConfig


@command_line.command("interpolate")
def main(cfg: InterpolateConfig) -> None:
    """Run the command."""
    with errors.usage_errors():
        run(cfg)


def run(cfg: InterpolateConfig) -> list[Path]:
    """Write the interpolated checkpoints, each as a run's directory, and return these. Raises: ValueError."""
    number = len(cfg.checkpoints)
    if number < 2:
        raise ValueError(f"checkpoints is {cfg.checkpoints}; expected at least two: checkpoints=[FIRST,SECOND]")
    mixtures = {Path(cfg.output): [1 / number] * number}
    if cfg.alpha is not None:
        alphas = cfg.alpha if isinstance(cfg.alpha, list) else [cfg.alpha]
        if not alphas or not accepts(alphas, list[float]):
            raise ValueError(f"alpha is {cfg.alpha!r}; expected a number or a list of them, such as [0,.25,.5,.75,1]")
        for alpha in alphas:
            errors.check_number("alpha", alpha, at_least=0, at_most=1)
        if number != 2:
            raise ValueError(f"alpha is given with {number} checkpoints; expected two, or no alpha for their mean")
        folders = [Path(cfg.output, f"alpha_{alpha:g}") for alpha in alphas]
        if len(set(folders)) < len(folders):
            raise ValueError(f"alpha is {alphas}, where two are equal to six digits; expected different ones")
        mixtures = {folder: [1 - alpha, alpha] for folder, alpha in zip(folders, alphas, strict=True)}
    tensors, objectives = interpolate.read(cfg.checkpoints, cfg.ema)
    without, scales = interpolate.left_out(tensors), interpolate.own_scales(tensors, objectives)
    for folder, weights in mixtures.items():
        mixed = interpolate.interpolate(tensors, weights, scales)
        interpolate.write(mixed, cfg.checkpoints, weights, folder, without, scales)
        Console(markup=False, emoji=False).print(str(folder), soft_wrap=True)
    return list(mixtures)


if __name__ == "__main__":
    main()
