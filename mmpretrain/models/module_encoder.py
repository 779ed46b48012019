"""Image encoder around any module, such as a network of torchvision, of Hugging Face or of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import check_number
from mmpretrain.models.encoders import has_batch_norm
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.layers import layers_above_by_name
from mmpretrain.models.masking import PatchMask

_LARGEST = 4096
_EXPECTED = (
    "a floating-point tensor [b, d], [b, N, d] or [b, d, rows, columns], or an object with last_hidden_state: name the part "
    "to read with model.image.output=..."
)


class ModuleEncoder(nn.Module):
    """Image encoder around a module that maps images [b, c, h, w] to states.

    The module returns one of

    - pooled states [b, d];
    - tokens [b, N, d];
    - a feature map [b, d, rows, columns], whose positions are the tokens;
    - an object or a dictionary with `last_hidden_state`, one of the three above, and perhaps `pooler_output`, as models of
      Hugging Face do.

    The width d is that of the output for one image of zeros. Patches cannot be dropped (`is_vit` is False): `objective.mae`
    and a `mask_ratio` need a plain ViT of `mmpretrain.models.vit.TimmEncoder`.

    Args:
        module: the module; a `_target_` with its arguments.
        image_size: side of the images, in pixels.
        channels: c, number of channels of the images.
        output: name of the part of the module's output to read, an attribute or a key; None: the output itself, or its
            `last_hidden_state`.
        pool: pooling of tokens, `mean` or `first`, the state of the first token; a feature map has `mean` only. None:
            `pooler_output` if the output has it and `output` is None, else `mean`.
        remove: names of submodules to replace by the identity, such as the classifier: `[fc]` of a ResNet of torchvision.

    Raises: ValueError if the module cannot encode such images or returns anything else, or has no submodule of that name.
    """

    is_vit = projects = False

    def __init__(
        self,
        module: Any,
        image_size: int = 224,
        channels: int = 3,
        output: str | None = None,
        pool: Literal["mean", "first"] | None = None,
        remove: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_number("model.image.image_size", image_size, at_least=1, at_most=_LARGEST)
        check_number("model.image.channels", channels, at_least=1)
        if not isinstance(module, nn.Module):
            raise ValueError(f"model.image.module is a {type(module).__name__}; expected a torch.nn.Module")
        halves = {str(each.dtype) for each in module.parameters() if each.dtype in (torch.float16, torch.bfloat16)}
        if halves:
            raise ValueError(
                f"model.image.module has parameters of {', '.join(sorted(halves))}; expected torch.float32, since "
                "trainer.precision sets the precision of computations: convert it with .float()"
            )
        for name in remove:
            if name not in dict(module.named_modules()) or not name:
                children = ", ".join(child for child, _ in module.named_children())
                raise ValueError(
                    f"model.image.remove has {name!r}; expected submodules of the module, such as {children}"
                )
            module.set_submodule(name, nn.Identity())
        self.module = module
        self.image_size = image_size
        self.output = output
        self.pool = pool
        self.has_batch_norm = has_batch_norm(module)
        self.width = self._find_width(channels)

    def _find_width(self, channels: int) -> int:
        """Return the width of the pooled states of one image of zeros, without changing the module's state."""
        first = next(self.module.parameters(), torch.zeros(()))
        images = torch.zeros(1, channels, self.image_size, self.image_size, dtype=first.dtype, device=first.device)
        training = [module for module in self.modules() if module.training]
        self.eval()
        with torch.no_grad():
            try:
                states = self.module(images)
            except Exception as error:  # a module of any library
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(
                    f"model.image.module cannot encode images {list(images.shape)} ({reason}); expected a module of images "
                    "alone: check model.image.image_size and model.image.channels"
                ) from error
            width = self._encoding(states).pooled.shape[-1]
        for module in training:
            module.training = True
        return int(width)

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode images [b, c, h, w]. Raises: ValueError if a mask is given, or for an output that cannot be read."""
        if mask is not None:
            raise ValueError(f"{type(self.module).__name__} cannot drop patches; expected a plain ViT of timm (vit_*)")
        return self._encoding(self.module(images))

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter: as the module's `layers_above` says, or by its blocks' names.

        Raises: ValueError if it has neither (see `layers.layers_above`).
        """
        own = getattr(self.module, "layers_above", None)
        above = layers_above_by_name(self.module) if own is None else own()
        return {f"module.{name}": number for name, number in above.items()}

    def _encoding(self, output: Any) -> Encoding:
        pooled, states = None, output
        if self.output is not None:
            states = _part(output, self.output)
        elif not isinstance(output, Tensor):
            pooled = _part(output, "pooler_output") if self.pool is None else None
            states = _part(output, "last_hidden_state")
        if not isinstance(states, Tensor) or not states.is_floating_point() or not 2 <= states.ndim <= 4:
            found = (
                f"a tensor {list(states.shape)} of {states.dtype}"
                if isinstance(states, Tensor)
                else f"a {type(output).__name__}"
            )
            named = "" if self.output is None else f" for model.image.output={self.output}"
            raise ValueError(f"model.image.module returned {found}{named}; expected {_EXPECTED}")
        if self.pool == "first" and states.ndim == 4:
            raise ValueError(f"model.image.pool is first for a feature map {list(states.shape)}; expected mean")
        tokens = states[:, None] if states.ndim == 2 else states
        tokens = tokens.flatten(2).transpose(1, 2) if states.ndim == 4 else tokens
        if pooled is not None:
            pooled_states = pooled.flatten(1)  # convolutional models of Hugging Face return [b, d, 1, 1]
        else:
            pooled_states = tokens[:, 0] if self.pool == "first" or states.ndim == 2 else tokens.mean(dim=1)
        return Encoding(lambda: tokens, lambda _: pooled_states)


def _part(output: Any, name: str) -> Any:
    """Return an attribute or a value of a module's output by its name; None if it is absent."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
