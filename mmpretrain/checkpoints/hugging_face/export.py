"""Export to `transformers`: the model's shape decides its class."""

import json
from pathlib import Path

from mmpretrain import files
from mmpretrain.checkpoints import tensor_files
from mmpretrain.checkpoints.exported import Exported
from mmpretrain.checkpoints.hugging_face.clip import clip
from mmpretrain.checkpoints.hugging_face.inputs import preprocessor_config, write_tokenizer
from mmpretrain.checkpoints.hugging_face.siglip import pools_by_attention, siglip
from mmpretrain.checkpoints.hugging_face.vit import vit
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.models.huggingface import HuggingFaceText, quiet

_IMAGES = """
The processor on Pillow resizes exactly as in our evaluation; the one on torchvision, transformers' default, differs by a grey
level in places. Both round the offset of the centre's crop down and we round it to even, which shifts some images by a
pixel."""
_BIAS = """
The model was trained with a bias of {bias:.6g} beside the scale, which CLIPModel does not have (`logit_bias` in config.json):
add it to the logits before a sigmoid."""


def export(loaded: Loaded, folder: Path) -> Exported:
    """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    A model of two towers becomes a SiglipModel if its image tower pools by attention, else a CLIPModel; an image tower alone
    a ViTModel; a text tower alone the class that it has, if it is a model of Hugging Face.

    Raises: ValueError that names the part which the class does not have.
    """
    model = loaded.model
    if model.image is None:
        return _text(loaded, folder)
    images = preprocessor_config(model)
    if model.text is None:
        config, tensors = vit(model)
    else:
        convert = siglip if pools_by_attention(model) else clip
        config, tensors = convert(model, loaded.tokenizer, loaded.scalars)
    kind = config["architectures"][0]
    usage = _usage(kind)
    if model.text is not None:
        usage += f"\n{write_tokenizer(loaded.tokenizer, folder)}".rstrip()
    if kind == "CLIPModel" and "logit_bias" in loaded.scalars:
        config["logit_bias"] = loaded.scalars["logit_bias"]
        usage += _BIAS.format(bias=config["logit_bias"])
    # Older releases of transformers read torch_dtype, and all of them this note of the tensors' framework.
    _write_json(folder / "config.json", {**config, "torch_dtype": "float32"})
    _write_json(folder / "preprocessor_config.json", images)
    tensor_files.save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Exported("transformers", usage + _IMAGES)


def _write_json(path: Path, content: object) -> None:
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def _usage(kind: str) -> str:
    if kind == "ViTModel":
        return """\
```python
from transformers import AutoImageProcessor, ViTModel
model = ViTModel.from_pretrained("DIR", add_pooling_layer=False)
processor = AutoImageProcessor.from_pretrained("DIR")
states = model(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]    # the class token
```
Objectives' heads, such as MAE's decoder, are left out."""
    padding = 'padding="max_length", truncation=True' if kind == "SiglipModel" else "padding=True, truncation=True"
    pad = " The text tower attends to padding: always pad to its full length." if kind == "SiglipModel" else ""
    return f"""\
```python
from transformers import AutoImageProcessor, AutoTokenizer, {kind}
model = {kind}.from_pretrained("DIR")
processor, tokenizer = AutoImageProcessor.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
texts = tokenizer(["a photo"], {padding}, return_tensors="pt")
outputs = model(**processor(image, return_tensors="pt"), input_ids=texts["input_ids"])
outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image
```
{pad}"""


def _text(loaded: Loaded, folder: Path) -> Exported:
    text = loaded.model.text
    if not isinstance(text, HuggingFaceText):
        raise ValueError(
            f"model.text is a {type(text).__name__}, which normalises before each branch and which no class of transformers "
            "has, BertModel neither; expected a text tower of Hugging Face (model=huggingface)"
        )
    with quiet():
        text.transformer.save_pretrained(folder)
    cleaning = write_tokenizer(loaded.tokenizer, folder)
    kind = type(text.transformer).__name__
    pooling = {
        "mean": "the mean over the tokens that are no padding",
        "cls": "that of the first token",
        "last": "that of the last token that is no padding",
    }[text.pool]
    return Exported(
        "transformers",
        f"""\
```python
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")    # a {kind}
states = model(**tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt")).last_hidden_state
```
The state of a text is {pooling}. The pooler, which was not trained, and objectives' heads are left out.
{cleaning}""".rstrip(),
    )
