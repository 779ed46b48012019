"""What an encoder gives."""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor


class Encoding:
    """An encoder's output, each part of it computed when it is first asked for: `pooled` alone costs less than all.

    Args:
        tokens: gives an image's [b, P + N, d], of which the first P are no patches (class and register tokens), or a
            text's [b, L, d], meaningless beyond each row's length.
        pooled: gives [b, d], one state for each image or text; it is handed the encoding, should it need the tokens.
            (A closure that held the encoding would make a cycle, and activations would wait for the garbage collector.)
    """

    def __init__(self, tokens: Callable[[], Tensor], pooled: "Callable[[Encoding], Tensor]") -> None:
        self._tokens, self._pooled = tokens, pooled

    @cached_property
    def tokens(self) -> Tensor:
        """[b, P + N, d] or [b, L, d]."""
        return self._tokens()

    @cached_property
    def pooled(self) -> Tensor:
        """[b, d]."""
        return self._pooled(self)
