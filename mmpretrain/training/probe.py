"""A small example before training: outputs of encoders and objectives, and the parameters that objectives reach."""

from mmpretrain.batch import Batch
from mmpretrain.models.encoders import check_encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import check_outputs
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Encodings, Task


def reached_parameters(task: Task, example: Batch) -> dict[str, frozenset[str]]:
    """Return the names of the parameters that each objective's gradient reaches.

    They are determined by a backward pass of each objective on a small example. Without this, the optimiser would apply
    weight decay to an unused tower or pooling head, and DDP would wait for their gradients.

    Args:
        task: the model and its objectives; its gradients are cleared.
        example: small batch of each stream.

    Raises: ValueError if an encoder or an objective returns what its protocol does not allow.
    """
    task.eval()
    _check_encoders(task.model, example)
    reached = {}
    for objective in task.objectives:
        check_outputs(task.objectives[objective], Encodings(task.model, example), f"objective.{objective}")
        forward_backward(task, task, [example], {name: float(name == objective) for name in task.objectives})
        reached[objective] = frozenset(
            name for name, parameter in task.named_parameters() if parameter.grad is not None
        )
        task.zero_grad()
    task.train()
    return reached


def _check_encoders(model: ImageTextModel, example: Batch) -> None:
    """Raises: ValueError if an encoder returns something else than an `Encoding` of the example's samples."""
    encodings = Encodings(model, example)
    for name, samples in example.streams.items():
        if model.image is not None and samples.images is not None:
            check_encoding(encodings.image(name), model.image, "model.image", len(samples))
        if model.text is not None and samples.text is not None:
            check_encoding(encodings.text(name), model.text, "model.text", len(samples))
