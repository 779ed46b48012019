"""Zero-shot classification of images that an adversary has changed: FGSM and PGD within an L-infinity radius."""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed, seeds
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.shared_images import ReadSamples, shared_images
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score, mean_score

_SCALE = 100.0  # of the logits of a run without logit_scale: the bound that CLIP's has

Gradient = Callable[[Tensor], Tensor]
"""Function from pixels in [0, 255], float [b, c, h, w], to a positive multiple of the loss's gradient for each image."""


def fgsm(images: Tensor, gradient: Gradient, radius: float) -> Tensor:
    """Return x + radius * sign(gradient), in [0, 255] (Goodfellow et al. 2015, section 4)."""
    return (images + radius * gradient(images).sign()).clamp(0, 255)


def pgd(images: Tensor, gradient: Gradient, radius: float, steps: int, step_size: float, start: Tensor) -> Tensor:
    """Return the last of `steps` ascents, each projected to the radius and to [0, 255] (Madry et al. 2018, section 2.1).

    Args:
        images: pixels, float [b, c, h, w].
        gradient: see `Gradient`.
        radius: largest change of a pixel.
        steps: number of steps.
        step_size: change of a pixel in one step.
        start: change of the pixels before the first step, of the same shape, within the radius.
    """
    low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=255)
    changed = (images + start).clamp(low, high)
    for _ in range(steps):
        changed = (changed + step_size * gradient(changed).sign()).clamp(low, high)
    return changed


class Adversarial:
    """Classify images after attacks on the zero-shot classifier, whose loss is cross-entropy of logit_scale * similarity.

    Pixels stay fractional, in [0, 255]. An image counts as right only if it is so without a change, too, since an adversary
    may leave it alone; only such images are attacked. Each step of an attack costs a forward and a backward pass.

    Args:
        data: names of `data.val` to use; None uses each data set with `classes` and `label`.
        radii: largest change of a pixel, in grey levels of 255: 4 is 4/255.
        attacks: some of `fgsm` (one step) and `pgd` (several steps from a random start).
        steps: number of steps of PGD.
        step_size: step of PGD, as a fraction of the radius.
        max_samples: largest number of images, spread evenly over the data set; None: all.

    Raises: UsageError if an attack is unknown, or a number is out of range.
    """

    needs = "label and classes"

    def __init__(
        self,
        data: Sequence[str] | None = None,
        radii: Sequence[float] = (1, 4),
        attacks: Sequence[str] = ("fgsm", "pgd"),
        steps: int = 10,
        step_size: float = 0.25,
        max_samples: int | None = 500,
    ) -> None:
        if not radii:
            raise UsageError("radii is []; expected at least one, such as radii=[1,4]")
        for radius in radii:
            check_number("radii", radius, above=0, at_most=255)
        if not attacks or not set(attacks) <= {"fgsm", "pgd"}:
            raise UsageError(f"attacks is {list(attacks)}; expected fgsm, pgd or both: attacks=[fgsm,pgd]")
        check_number("steps", steps, at_least=1)
        check_number("step_size", step_size, above=0)
        if max_samples is not None:
            check_number("max_samples", max_samples, at_least=1)
        self.data = data
        self.radii = radii
        self.attacks = attacks
        self.steps = steps
        self.step_size = step_size
        self.max_samples = max_samples

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with classes and labels."""
        return context.classified_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `<attack>_acc1@<radius>`, and `unattacked_acc1` of the same images."""
        data, embedded = context.sets[name], context.embedded(name)
        assert data.classes is not None and data.preprocess is not None
        weights = class_embeddings(data.classes, context)
        rows = torch.tensor(evenly_spread(self.max_samples, len(embedded.images)))
        labels = embedded.labels[rows]
        is_right = right_class_ranks(embedded.images[rows] @ weights.T, labels) < 1
        right = is_right.nonzero()[:, 0]
        samples = embedded.samples[rows][right.cpu()].tolist()
        chosen = [(attack, radius) for attack in self.attacks for radius in self.radii]
        hits = [torch.zeros(0, len(chosen), dtype=torch.bool, device=labels.device)]
        with closing(shared_images(context, data.preprocess, ReadSamples(data, samples), len(samples))) as batches:
            for batch in batches:
                images = batch.images.to(context.model.device).float()
                of_batch = labels[right[batch.samples]]
                numbers = torch.tensor([samples[item] for item in batch.samples], device=images.device)
                found = [
                    self._attack(context, images, of_batch, weights, numbers, attack, radius)
                    for attack, radius in chosen
                ]
                hits.append(torch.stack(found, dim=1))
        attacked = distributed.gather_ragged_rows(torch.cat(hits)).double()
        all_hits = attacked.new_zeros(len(rows), len(chosen))
        all_hits[right] = attacked
        return {
            "unattacked_acc1": mean_score(is_right, labels),
            **{
                f"{attack}_acc1@{radius:g}": mean_score(all_hits[:, i], labels)
                for i, (attack, radius) in enumerate(chosen)
            },
        }

    def _attack(
        self,
        context: Context,
        images: Tensor,
        labels: Tensor,
        weights: Tensor,
        samples: Tensor,
        attack: str,
        radius: float,
    ) -> Tensor:
        """Return whether each image is classified rightly after an attack, bool [b]."""
        scale = _SCALE if context.logit_scale is None else context.logit_scale

        def embedded(pixels: Tensor) -> Tensor:
            with context.autocast:
                return context.model.project_image(context.model.encode_image(pixels).pooled).float()

        def gradient(pixels: Tensor) -> Tensor:
            with torch.enable_grad():
                pixels = pixels.detach().requires_grad_()
                rows = embedded(pixels)
                ascent = loss_ascent(rows.detach(), labels, weights, scale)
                return torch.autograd.grad((rows * ascent).sum(), pixels)[0]  # the parameters get no gradients

        if attack == "fgsm":
            changed = fgsm(images, gradient, radius)
        else:
            drawn = seeds.torch_uniform(samples, images[0].numel(), seeds.hash64("adversarial")).view(images.shape)
            start = radius * (2 * drawn - 1).float()
            changed = pgd(images, gradient, radius, self.steps, self.step_size * radius, start)
        return right_class_ranks(embedded(changed) @ weights.T, labels) < 1


def loss_ascent(rows: Tensor, labels: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Return the gradient of each row's cross-entropy, float32 [b, e], divided by its largest component.

    It is a multiple of sum_j q_j w_j - w_y, with the softmax q over the wrong classes alone. The attacks use signs alone, and
    without the factor 1 - p_y the gradients of sure predictions do not vanish.

    Args:
        rows: embeddings [b, e].
        labels: true classes y, int64 [b].
        weights: embeddings w of the classes [C, e].
        scale: factor of the similarities.
    """
    weights = weights.double()
    logits = scale * rows.double() @ weights.T
    wrong = logits.scatter(1, labels[:, None], -torch.inf).softmax(1).nan_to_num()  # a single class has no wrong one
    ascent = wrong @ weights - weights[labels]
    return F.normalize(ascent, p=torch.inf, dim=1, eps=torch.finfo(torch.float64).tiny).float()
