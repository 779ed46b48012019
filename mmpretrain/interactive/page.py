"""The page of `mmpretrain.demo`, made with Gradio: a tab for each thing that the model can do."""

import html
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.evals.base import Context
from mmpretrain.interactive.abilities import Abilities
from mmpretrain.interactive.classification import Classifier, class_names
from mmpretrain.interactive.reconstruction import reconstructions
from mmpretrain.interactive.search import Found, ImageSearch
from mmpretrain.interactive.word_maps import word_maps
from mmpretrain.objectives.mae import MAE
from mmpretrain.reporting import pictures
from mmpretrain.seeds import hash64

Shown = list[tuple[np.ndarray, str]]
"""Pictures, uint8 [h, w, 3], with their captions."""

_TEMPLATES: dict[str, str | Sequence[str]] = {
    "the name alone": ["{}"],
    "simple: 7 sentences": "simple",
    "openai: 80 sentences": "openai",
}
_MAX_SHOWN = 60
_MAX_SCORES = 10
_MAX_CHARACTERS = 100_000
_NUM_MASKS = 4
_MAX_SEED = 1_000_000
_SIDE = 288


def build(title: str, abilities: Abilities) -> gr.Blocks:
    """Build the page with a tab for each ability. Nothing on it is fetched from the network."""
    context, preprocess = abilities.context, abilities.preprocess
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {html.escape(title)}")
        with gr.Tabs():
            if abilities.search is not None:
                with gr.Tab("Search"):
                    _search_tab(abilities.search, preprocess, has_text=context.model.text is not None)
            if abilities.classifier is not None:
                with gr.Tab("Zero-shot"):
                    _zero_shot_tab(abilities.classifier, preprocess)
            if abilities.has_word_maps:
                with gr.Tab("Words"):
                    _words_tab(context, preprocess)
            if abilities.autoencoder is not None:
                with gr.Tab("Reconstruction"):
                    _reconstruction_tab(abilities.autoencoder, context, preprocess)
    return blocks


def theme() -> gr.themes.Base:
    """Return Gradio's default theme with the fonts of the reader's system, which are not fetched."""
    return gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


def _search_tab(search: ImageSearch, preprocess: Preprocess, has_text: bool) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            count = gr.Slider(1, _MAX_SHOWN, value=12, step=1, label="images to show")
            if has_text:
                text = gr.Textbox(label="text", placeholder="a red apple", max_length=_MAX_CHARACTERS)
                by_text = gr.Button("Search by text", variant="primary")
            image = _image_input(preprocess)
            by_image = gr.Button("Search by image")
        found = _gallery(f"The most similar of {search.num_images:,} images", columns=4)

    def of_text(text: str | None, count: float) -> Shown:
        return _captioned(search.by_text(text or "", int(count)))

    def of_image(file: str | None, count: float) -> Shown:
        return _captioned(search.by_image(_preprocessed(file, preprocess), int(count)))

    if has_text:
        for trigger in (by_text.click, text.submit):
            _on(trigger, of_text, [text, count], found, "search_by_text")
    _on(by_image.click, of_image, [image, count], found, "search_by_image")


def _captioned(found: Sequence[Found]) -> Shown:
    return [(each.image, f"{each.similarity:.3f}  {each.key}") for each in found]


def _zero_shot_tab(classifier: Classifier, preprocess: Preprocess) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = _image_input(preprocess)
            classes = gr.Textbox(label="classes, one a line", lines=6, max_length=_MAX_CHARACTERS)
            templates = gr.Dropdown(
                list(_TEMPLATES),
                label="texts of a class, or a sentence of your own with {} for the name",
                allow_custom_value=True,
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=2):
            scores: gr.Label | gr.Dataframe
            if classifier.has_probabilities:
                scores = gr.Label(label="probability", num_top_classes=_MAX_SCORES)
            else:
                gr.Markdown("The checkpoint has no `logit_scale`, so that there are no probabilities but cosines.")
                scores = gr.Dataframe(headers=["class", "cosine"], interactive=False)

    def classify(file: str | None, classes: str | None, templates: str | None) -> Any:
        names, chosen = class_names(classes or ""), _TEMPLATES.get(templates or "", [templates or ""])
        scored = classifier(_preprocessed(file, preprocess), names, chosen)[:_MAX_SCORES]
        return dict(scored) if classifier.has_probabilities else [[name, round(score, 4)] for name, score in scored]

    _on(button.click, classify, [image, classes, templates], scores, "classify")


def _words_tab(context: Context, preprocess: Preprocess) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = _image_input(preprocess)
            text = gr.Textbox(label="text", placeholder="a red apple", max_length=_MAX_CHARACTERS)
            button = gr.Button("Compare", variant="primary")
        maps = _gallery(
            "Similarity of the patches to the text and to each word. Light ones are the most similar.",
            columns=3,
        )

    def compare(file: str | None, text: str | None) -> Shown:
        pixels = _preprocessed(file, preprocess)
        return [
            (pictures.heat_map(pixels, values, _SIDE), f"{each}  ({values.min():.2f} to {values.max():.2f})")
            for each, values in word_maps(pixels, text or "", context)
        ]

    for trigger in (button.click, text.submit):
        _on(trigger, compare, [image, text], maps, "word_maps")


def _reconstruction_tab(autoencoder: MAE, context: Context, preprocess: Preprocess) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = _image_input(preprocess)
            seed = gr.Number(0, label="seed of the masks", precision=0, minimum=0, maximum=_MAX_SEED)
            button = gr.Button("Reconstruct", variant="primary")
        found = _gallery("The image, its visible patches, and these with predictions for the others: a mask a row.", 3)

    def reconstruct(file: str | None, seed: float | None) -> Shown:
        pixels, seeds = _preprocessed(file, preprocess), [hash64(int(seed or 0), row) >> 1 for row in range(_NUM_MASKS)]
        rows = reconstructions(pixels, seeds, autoencoder, context)
        return [(pictures.enlarged(each, _SIDE), "") for row in rows for each in row]

    _on(button.click, reconstruct, [image, seed], found, "reconstruct")


def _gallery(label: str, columns: int) -> gr.Gallery:
    with gr.Column(scale=3):
        gr.Markdown(label)
        return gr.Gallery(
            show_label=False, columns=columns, object_fit="contain", height=760, buttons=["fullscreen", "download"]
        )


def _image_input(preprocess: Preprocess) -> gr.File:
    """Add an upload of one image, with a preview of what the model sees of it.

    Gradio's own input of images would open any format that Pillow knows; here `preprocess` alone decodes.
    """
    file = gr.File(label="image", file_types=[f".{kind}" for kind in IMAGE_EXTENSIONS], height=110)
    preview = gr.Image(label="as the model sees it", height=200, interactive=False, buttons=[], visible=False)

    def show(file: str | None) -> Any:
        if file is None:
            return gr.Image(value=None, visible=False)
        return gr.Image(value=pictures.enlarged(_preprocessed(file, preprocess), _SIDE), visible=True)

    _on(file.change, show, [file], preview, None)
    return file


def _preprocessed(file: str | None, preprocess: Preprocess) -> Tensor:
    if file is None:
        raise ValueError("no image is given; upload one")
    return preprocess(Path(file))


def _on(trigger: Any, function: Callable[..., Any], inputs: list[Any], output: Any, name: str | None) -> None:
    """Call a function on an event, and show a ValueError as one line. One call at a time uses the model."""

    @wraps(function)
    def answered(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            message = html.escape(" ".join(str(error).split()), quote=False)
            raise gr.Error(message, title="", print_exception=False) from None

    visibility = "private" if name is None else "public"
    trigger(answered, inputs, output, api_name=name, api_visibility=visibility, concurrency_id="model")
