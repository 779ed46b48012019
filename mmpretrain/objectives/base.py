"""What a model is trained for. One file each; a class is an objective by having the methods of one protocol below.

An objective's `__init__` takes the model first, for its shapes alone, then the arguments of its YAML. It holds
the heads that it alone uses. No objective knows of ranks, micro-batches or other objectives.

An objective may also define the hooks of `Hooks`, which have defaults. If its `__init__` has a parameter `config_path`, it
receives its own name in the configuration, such as `objective.mae`, for its messages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Protocol, runtime_checkable

from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec, PatchMask, TokenMask, TokenMaskSpec
from mmpretrain.schedules import TrainingProgress

Terms = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""A sum over terms, a scalar; or with it further sums to be shown per term, such as hits as `accuracy`."""


Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, special tokens left out."""


@dataclass(frozen=True)
class Example:
    """What an objective made of one sample, to be looked at."""

    images: Sequence[Tensor]
    """Pictures beside each other, uint8 [3, h, w] each."""
    text: str


class TokenIds(Protocol):
    """What an objective may know of the tokenizer: the ids that it gives, and the mask token's, if it has one."""

    vocab_size: int

    @property
    def mask_id(self) -> int | None: ...


class Encodings(Protocol):
    """What an objective sees of a micro-batch (see `mmpretrain.training.task.Encodings`)."""

    batch: Batch

    def samples(self, stream: str) -> Samples: ...
    def num_terms(self, objective: "IndependentObjective") -> int | None: ...
    def pixels(self, stream: str) -> Tensor: ...
    def patch_mask(self, stream: str, spec: MaskSpec) -> PatchMask: ...
    def image(self, stream: str, mask: MaskSpec | None = None) -> Encoding: ...
    def view(self, stream: str, number: int) -> Encoding: ...
    def token_mask(self, stream: str, spec: TokenMaskSpec) -> TokenMask: ...
    def text(self, stream: str, mask: TokenMaskSpec | None = None) -> Encoding: ...
    @property
    def token_embeddings(self) -> Tensor: ...
    def with_text(self, stream: str, text: Tensor, lengths: Tensor) -> "Encodings": ...
    def to_images(self, pixels: Tensor) -> Tensor: ...
    def image_embedding(self, stream: str, mask: MaskSpec | None = None) -> Tensor: ...
    def text_embedding(self, stream: str) -> Tensor: ...


@runtime_checkable
class IndependentObjective(Protocol):
    """A sum over independent terms, divided by their number in the whole batch; told from a coupled one by `count`."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def count(self, batch: Batch) -> Tensor:
        """The number of terms of a micro-batch, a scalar, from seeds and masks alone: no encoder runs for it.

        In training the micro-batch is still on the host: nothing waits for the device.
        """
        ...

    def loss(self, encodings: Encodings) -> Terms:
        """The SUM over the micro-batch's terms, a scalar; further sums beside it are shown per term."""
        ...


class CoupledObjective(Protocol):
    """A loss in which every sample of the batch meets every other."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def embed(self, encodings: Encodings) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(rows: tensors [b, ...] of a micro-batch; shared: the objective's own scalars)."""
        ...

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The loss of the whole batch, a scalar, from the rows [B, ...] of all of it; plain tensor code."""
        ...


Objective = IndependentObjective | CoupledObjective


@dataclass(frozen=True)
class Hooks:
    """What an objective may define besides the methods of its protocol, with the defaults.

    State that hooks keep belongs in buffers or in parameters that need no gradient: checkpoints hold both, and a resumed run
    goes on from them. Forward passes outside of training (a dry run, a diagnosis, an evaluation) call no hook.
    """

    num_views: int = 0
    """The number of additional views of its streams' images that it reads (SimCLR reads 2)."""
    perplexity: bool = False
    """Whether exp(loss) is logged as `<objective>_perplexity`."""
    set_tokenizer: Callable[[TokenIds], None] = lambda tokenizer: None
    """Called once, before the first step and before weights are loaded."""
    after_init: Callable[[ImageTextModel], None] = lambda model: None
    """Called once in a new run, with the model's first weights, those of `init_from` included: a teacher copies them here.
    A resumed run has its state from the checkpoint and does not call it."""
    after_step: Callable[[ImageTextModel, TrainingProgress, Tensor], None] = lambda model, progress, skipped: None
    """Called after each optimiser step on every rank: (the model, the samples seen before the step, whether the step was
    skipped for a gradient that is not finite, a float32 scalar of 0 or 1 on the device). Moves a teacher's average or a
    queue, or clamps a parameter. Branching on `skipped` would make the host wait: use torch.where or multiply."""
    examples: Callable[[Encodings, Decode], list[Example]] | None = None
    """Gives pictures and texts of each sample of a small batch, for TensorBoard."""


_HOOKS = {hook.name: hook for hook in fields(Hooks)}
_RENAMED = {"constrain": "after_step(model, progress, skipped)", "fit": "set_tokenizer(tokenizer)"}


def hooks_of(objective: Objective) -> Hooks:
    """The hooks that an objective defines; defaults stand in for the others."""
    return Hooks(**{name: getattr(objective, name) for name in _HOOKS if hasattr(objective, name)})


def check_hooks(objective: Objective, config_path: str) -> None:
    """Raises: ValueError for a method that is probably meant as a hook, but is spelt otherwise."""
    own = {
        name for kind in type(objective).__mro__ if kind.__module__.partition(".")[0] != "torch" for name in vars(kind)
    }
    for name in sorted(own - {*_HOOKS, "count", "loss", "embed", "streams"}):
        meant = _RENAMED.get(name) or next(iter(get_close_matches(name, _HOOKS, n=1, cutoff=0.8)), None)
        if meant is not None and not name.startswith("_"):
            raise ValueError(
                f"{config_path}: {type(objective).__name__}.{name} is no hook of an objective and would never be called; "
                f"did you mean {meant}?"
            )


Couple = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""(objective, rows of this micro-batch, shared) -> (d loss / d rows, d loss / d shared)."""
