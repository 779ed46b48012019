"""What a checkpoint's model can be asked on the page, and why not the rest."""

import logging
from dataclasses import dataclass

from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.evals.base import Context
from mmpretrain.evals.patch_similarity import embeds_patches
from mmpretrain.interactive.classification import Classifier
from mmpretrain.interactive.search import ImageSearch
from mmpretrain.objectives.mae import MAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Abilities:
    """What the page has a tab for; None or False if it has none."""

    context: Context
    preprocess: Preprocess
    search: ImageSearch | None
    classifier: Classifier | None
    has_word_maps: bool
    autoencoder: MAE | None


def abilities_of(loaded: Loaded, context: Context) -> Abilities:
    """Return what a model can be asked. The log names each absent tab, with the reason.

    Args:
        loaded: the checkpoint.
        context: its model; images to search are its data set `images`.

    Raises: ValueError if the model has no image encoder, or no image can be read.
    """
    if loaded.preprocess is None:
        raise ValueError(f"{loaded.folder}: the model has no image encoder; expected one, which every tab needs")
    reasons = {
        "Search": None if context.sets else "images is not given",
        "Zero-shot": _lacking_text(loaded),
        "Words": _lacking_text(loaded) or _lacking_patches(loaded),
    }
    autoencoder, reasons["Reconstruction"] = _autoencoder(loaded)
    for tab, reason in reasons.items():
        if reason is not None:
            log.info("no tab %s: %s", tab, reason)
    return Abilities(
        context=context,
        preprocess=loaded.preprocess,
        search=ImageSearch(context, "images") if context.sets else None,
        classifier=None if reasons["Zero-shot"] else Classifier(context),
        has_word_maps=reasons["Words"] is None,
        autoencoder=autoencoder,
    )


def _lacking_text(loaded: Loaded) -> str | None:
    return None if loaded.model.text is not None else "the model has no text encoder"


def _lacking_patches(loaded: Loaded) -> str | None:
    if embeds_patches(loaded.model):
        return None
    return "the image encoder has no patch tokens that can be projected like a pooled token"


def _autoencoder(loaded: Loaded) -> tuple[MAE | None, str | None]:
    """Return the checkpoint's first MAE, or None and the reason."""
    try:
        objectives = loaded.objectives
    except ValueError as error:  # the other tabs need no objective
        return None, f"the objectives cannot be built ({error})"
    found = [objective for objective in objectives.values() if isinstance(objective, MAE)]
    return (found[0], None) if found else (None, "the checkpoint has no objective mae")
