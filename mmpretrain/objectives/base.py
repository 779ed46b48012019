"""Interface of training objectives. A class is an objective if it implements one of the protocols below.

The first argument of an objective's `__init__` is the model, from which it reads only shapes; the others are the arguments
of its YAML. The objective owns the heads that only it uses. Its result does not depend on ranks, micro-batches or other
objectives. A loss of the whole step's rows may be computed by parts, each on one rank (`split` in `mmpretrain.losses`).

An objective may also define the hooks of `Hooks`, which have defaults. If its `__init__` has a parameter `config_path`, it
receives its own key in the configuration, such as `objective.mae`, for error messages. If it has `classes` and `stream`, it
receives the `Classes` of `data.train.<stream>`, or None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from mmpretrain.batch import Batch, Samples
from mmpretrain.errors import misspelt
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec, PatchMask, TokenMask, TokenMaskSpec
from mmpretrain.schedules import TrainingProgress

Terms = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""Sum of a loss over terms, a scalar; optionally with further sums to log per term, such as hits as `accuracy`."""


Decode = Callable[[Sequence[int]], str]
"""Function from token ids to text, without special tokens."""


@dataclass(frozen=True)
class Example:
    """Visualisation of an objective's output for one sample."""

    images: Sequence[Tensor]
    """Images to show side by side, uint8 [3, h, w] each."""
    text: str


class TokenIds(Protocol):
    """Part of the tokenizer that objectives may use: the vocabulary size, the id of the mask token, if there is one, and the
    ids of texts, int64 [b, L], with their lengths, int64 [b]."""

    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    @property
    def mask_id(self) -> int | None: ...


class Encodings(Protocol):
    """Interface through which an objective reads a micro-batch (see `mmpretrain.training.task.Encodings`)."""

    batch: Batch

    def samples(self, stream: str) -> Samples: ...
    def num_terms(self, objective: "IndependentObjective") -> int | None: ...
    def pixels(self, stream: str, view: int | None = None) -> Tensor: ...
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
    """Objective whose loss is a sum over independent terms, divided by their number in the whole batch.

    The method `count` distinguishes it from a coupled objective.
    """

    @property
    def streams(self) -> tuple[str, ...]: ...

    def count(self, batch: Batch) -> Tensor:
        """Return the number of terms of a micro-batch, a scalar, from seeds and masks alone, without running an encoder.

        In training the micro-batch is still on the host, so that the call does not synchronise with the device.
        """
        ...

    def loss(self, encodings: Encodings) -> Terms:
        """Return the SUM of the loss over the micro-batch's terms, a scalar; further sums are logged per term."""
        ...


class CoupledObjective(Protocol):
    """Objective whose loss depends jointly on all samples of the batch, such as a contrastive loss."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def embed(self, encodings: Encodings) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Compute the inputs of the loss for a micro-batch.

        Returns: (rows, tensors [b, ...] with one row per sample; shared, tensors computed from the objective's parameters).
        """
        ...

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the whole batch, a scalar, from the rows [B, ...] of all its samples, in plain tensor code."""
        ...


Objective = IndependentObjective | CoupledObjective


@dataclass(frozen=True)
class Hooks:
    """Optional attributes and methods of an objective, with their defaults.

    Keep state of hooks in buffers or in parameters without gradient: checkpoints contain both, and a resumed run restores
    them. Forward passes outside of training (dry run, diagnosis, evaluation) call no hook.
    """

    num_views: int = 0
    """Number of additional views of its streams' images that it reads (SimCLR reads 2)."""
    class_names: Sequence[str] | None = None
    """Names of the classes that it predicts. The run's directory keeps them, so that a checkpoint tells what it predicts."""
    reads_mixed: bool = False
    """True if it reads `mixed_labels` and `mixed_shares` of samples, so that `data.train.<stream>.mix` may mix images."""
    perplexity: bool = False
    """If True, exp(loss) is logged as `<objective>_perplexity`."""
    set_tokenizer: Callable[[TokenIds], None] = lambda tokenizer: None
    """Called once, before the first step and before weights are loaded."""
    after_init: Callable[[ImageTextModel], None] = lambda model: None
    """Called once in a new run with the initial weights, which include those of `init_from`. A teacher copies them here.
    A resumed run does not call it: its state comes from the checkpoint."""
    after_step: Callable[[ImageTextModel, TrainingProgress, Tensor], None] = lambda model, progress, skipped: None
    """Called after each optimiser step on every rank, to update a teacher's average or a queue, or to clamp a parameter.

    Its arguments are the model, the progress before the step, and `skipped`, a float32 scalar on the device: 1 if the step
    was skipped because of a non-finite gradient, else 0. Branching on `skipped` would make the host wait for the device; use
    torch.where or multiply instead."""
    examples: Callable[[Encodings, Decode], list[Example]] | None = None
    """Returns images and texts for each sample of a small batch, to be shown in TensorBoard."""


_HOOKS = {hook.name: hook for hook in fields(Hooks)}
_RENAMED = {"constrain": "after_step(model, progress, skipped)", "fit": "set_tokenizer(tokenizer)"}


def hooks_of(objective: Objective) -> Hooks:
    """Return the hooks of an objective, with defaults for those that it does not define."""
    return Hooks(**{name: getattr(objective, name) for name in _HOOKS if hasattr(objective, name)})


def check_objective(objective: object, config_path: str, model: ImageTextModel | None = None) -> None:
    """Check that an objective is a module with `streams`, `loss` and `count` or `embed`, and that no hook is misspelt.

    With `model`, check also that the objective keeps no part of it, which checkpoints would hold twice.

    Raises: ValueError for the first fault, such as a public name that resembles a hook or is a hook's former name.
    """
    kind = type(objective).__name__
    if not isinstance(objective, nn.Module):
        raise ValueError(
            f"{config_path}: {kind} is no torch.nn.Module; expected one, so that checkpoints hold its state"
        )
    if (wrong := misspelt(type(objective), _HOOKS, ("count", "loss", "embed", "streams"), _RENAMED)) is not None:
        raise ValueError(
            f"{config_path}: {kind}.{wrong[0]} is no hook of an objective and would never be called; "
            f"did you mean {wrong[1]}?"
        )
    shared = set() if model is None else {id(each) for each in (*model.parameters(), *model.buffers())}
    for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]:
        if id(tensor) in shared:
            raise ValueError(
                f"{config_path}: {kind} keeps a part of the model, {name}; expected a copy, such as "
                "copy.deepcopy(model.image).requires_grad_(False), or nothing: hooks and encodings give the model's outputs"
            )
    streams = getattr(objective, "streams", None)
    if not (isinstance(streams, tuple | list) and streams and all(isinstance(name, str) for name in streams)):
        raise ValueError(
            f'{config_path}: {kind}.streams is {streams!r}; expected the streams that it reads, such as ("pairs",)'
        )
    has_count, has_embed = (callable(getattr(objective, name, None)) for name in ("count", "embed"))
    if not callable(getattr(objective, "loss", None)) or not (has_count or has_embed):
        raise ValueError(
            f"{config_path}: {kind} lacks methods; expected loss, and count (independent samples) or embed (coupled ones)"
        )


def check_outputs(objective: Objective, encodings: Encodings, config_path: str) -> None:
    """Check what an objective's methods return for a small micro-batch; a coupled loss is checked where it is computed.

    Raises: ValueError for an output of another type or shape than the protocols state.
    """
    if isinstance(objective, IndependentObjective):
        if not _is_scalar(count := objective.count(encodings.batch)):
            raise ValueError(f"{config_path}: count returned {_shape_of(count)}; expected a tensor with one number")
        terms = objective.loss(encodings)
        total, others = terms if isinstance(terms, tuple) and len(terms) == 2 else (terms, {})
        check_loss(total, config_path)
        for name, value in others.items():
            if not _is_scalar(value):
                raise ValueError(
                    f"{config_path}: loss returned {name!r} as {_shape_of(value)}; expected a sum, one number"
                )
        return
    embedded = objective.embed(encodings)
    if not (isinstance(embedded, tuple) and len(embedded) == 2 and all(isinstance(part, Mapping) for part in embedded)):
        raise ValueError(
            f"{config_path}: embed returned {_shape_of(embedded)}; expected two dictionaries: rows, and tensors of its own "
            "parameters or {}"
        )
    size = len(encodings.samples(objective.streams[0]))
    if not embedded[0]:
        raise ValueError(f"{config_path}: embed returned no rows; expected tensors with one row for each sample")
    for name, rows in embedded[0].items():
        if not (isinstance(rows, Tensor) and rows.dim() and len(rows) == size):
            raise ValueError(
                f"{config_path}: embed returned {name!r} as {_shape_of(rows)}; expected a tensor with one row for each of "
                f"the {size} samples"
            )


def check_loss(loss: object, config_path: str) -> None:
    """Raises: ValueError if a loss is not one number with a gradient."""
    if not _is_scalar(loss):
        raise ValueError(f"{config_path}: loss returned {_shape_of(loss)}; expected one number: a sum over the samples")
    if not loss.requires_grad:
        raise ValueError(f"{config_path}: loss returned a number without a gradient; expected one of parameters")


def _is_scalar(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 0


def _shape_of(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


Couple = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""Function (name of the objective, rows of this micro-batch, shared) -> (d loss / d rows, d loss / d shared)."""
