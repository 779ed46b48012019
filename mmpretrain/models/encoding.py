"""Output of an encoder."""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor


class Encoding:
    """Lazily computed output of an encoder. Each part is computed on first access and cached.

    Accessing only `pooled` is cheaper than accessing both parts.

    Args:
        tokens: function that returns the token states. For images they are [b, P + N, d], where the first P are class and
            register tokens. For texts they are [b, L, d], with undefined values beyond each text's length.
        pooled: function that returns one state per image or text, [b, d]. It receives this encoding as its argument, from
            which it can read the tokens. (A closure over the encoding would create a reference cycle, and activations
            would stay in memory until the garbage collector runs.)
    """

    def __init__(self, tokens: Callable[[], Tensor], pooled: "Callable[[Encoding], Tensor]") -> None:
        self._tokens, self._pooled = tokens, pooled

    @cached_property
    def tokens(self) -> Tensor:
        """Token states, [b, P + N, d] for images or [b, L, d] for texts."""
        return self._tokens()

    @cached_property
    def pooled(self) -> Tensor:
        """Pooled states, [b, d]."""
        return self._pooled(self)
