"""Files of the preprocessing: preprocessor_config.json and a tokenizer that `transformers` reads."""

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.models import BPE

from mmpretrain import files
from mmpretrain.data.tokenizer import ClipTokenizer, FileTokenizer, HuggingFaceTokenizer, Tokenizer
from mmpretrain.models.image_text import ImageTextModel

_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLEANED = "mmpretrain first mends texts with ftfy and resolves HTML entities{}, which this tokenizer does not do."
_MAX_TOKENIZER_BYTES = 256 << 20


def preprocessor_config(model: ImageTextModel) -> dict[str, Any]:
    """Return the content of a model's preprocessor_config.json. Raises: ValueError if its images are not RGB."""
    if model.num_channels != 3:
        raise ValueError(
            f"the model takes images of {model.num_channels} channels; expected 3, as transformers' image processors give"
        )
    size = model.image_encoder.image_size
    resized = int(size / model.crop_pct)
    mean, std = (tensor.flatten().div(255).tolist() for tensor in (model.pixel_mean, model.pixel_std))
    return {
        "image_processor_type": "CLIPImageProcessor",  # it has all the steps, for any model
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resized, "width": resized} if model.squash else {"shortest_edge": resized},
        "resample": 2 if model.interpolation == "bilinear" else 3,
        "do_center_crop": resized != size or not model.squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Write a tokenizer that gives the same ids.

    Returns: a sentence on how its cleaning of texts differs from ours; empty if it does not.
    Raises: ValueError if `transformers` cannot read such a tokenizer.
    """
    # Exact types: a class of one's own may tokenize otherwise than the one that it inherits from.
    if type(tokenizer) is HuggingFaceTokenizer:
        tokenizer.save(folder)
        return _CLEANED.format(f", then cleans them as open_clip's `{tokenizer.clean}` (repeated spaces become one)")
    if type(tokenizer) is ClipTokenizer:
        backend, names = _clip(), {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
        difference = _CLEANED.format("")
    elif type(tokenizer) is FileTokenizer:
        backend = TokenizersTokenizer.from_str(files.read_text(tokenizer.file, _MAX_TOKENIZER_BYTES))
        names = {"eos_token": tokenizer.end, "pad_token": tokenizer.pad}
        names |= {} if tokenizer.mask_id is None else {"mask_token": str(backend.id_to_token(tokenizer.mask_id))}
        difference = ""
    else:
        raise ValueError(
            f"data.tokenizer is a {type(tokenizer).__name__}; expected one of those of mmpretrain.data.tokenizer"
        )
    backend.no_truncation()
    backend.no_padding()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": tokenizer.context_length,
        "padding_side": "right", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    files.write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    files.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return difference


def _clip() -> TokenizersTokenizer:
    """Return CLIP's byte-pair encoding as a tokenizer of the `tokenizers` library, with the parts of transformers' own."""
    own = SimpleTokenizer()
    of_own = dict(zip(("<start_of_text>", "<end_of_text>"), (_START, _END)))
    vocabulary = {of_own.get(token, token): number for token, number in own.encoder.items()}
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    backend = TokenizersTokenizer(
        BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_END,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # open_clip marks the end of a word where the byte-level decoder expects a space before it.
    backend.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    backend.add_special_tokens([_START, _END])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}",
        pair=f"{_START} $A $B {_END}",
        special_tokens=[(token, vocabulary[token]) for token in (_START, _END)],
    )
    return backend
