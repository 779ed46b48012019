"""Conversion of parameter names by tables of patterns."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Table = Sequence[tuple[str, str]]
"""(pattern that matches the beginning of our name, its replacement). `<q|k|v>` in a replacement cuts the tensor into as many
equal parts, each named by one of the alternatives."""

_LAYER = r"encoder.layers.\1."
# The transformers of CLIPModel and SiglipModel have the same names.
TIMM_BLOCKS: Table = (
    (r"blocks\.(\d+)\.norm(\d)\.", rf"{_LAYER}layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", rf"{_LAYER}self_attn.<q|k|v>_proj."),
    (r"blocks\.(\d+)\.attn\.proj\.", rf"{_LAYER}self_attn.out_proj."),
    (r"blocks\.(\d+)\.mlp\.(fc\d)\.", rf"{_LAYER}mlp.\2."),
)
OPEN_CLIP_BLOCKS: Table = (
    (r"transformer\.resblocks\.(\d+)\.ln_(\d)\.", rf"{_LAYER}layer_norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", rf"{_LAYER}self_attn.<q|k|v>_proj."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", rf"{_LAYER}self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", rf"{_LAYER}mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", rf"{_LAYER}mlp.fc2."),
)
TEXT: Table = (
    (r"token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_final\.", "final_layer_norm."),
    *OPEN_CLIP_BLOCKS,
)
"""The text towers `TextTransformer` and open_clip's, without their projection."""


def within(before: str, after: str, table: Table) -> Table:
    """Return a table with a prefix before its patterns and another before its replacements."""
    return tuple((f"{re.escape(before)}{pattern}", f"{after}{theirs}") for pattern, theirs in table)


_HAS_BIAS = re.compile(r".*(norm\d?|\.layers?\..*)\.weight")


def renamed(
    tensors: Mapping[str, Tensor], table: Table, kind: str, without_bias: str | None = None
) -> dict[str, Tensor]:
    """Rename tensors by the first row that matches.

    Args:
        tensors: tensors by our names.
        table: rows of patterns.
        kind: the class of Hugging Face, for messages.
        without_bias: pattern in our names of the layers that may lack a bias; None: none may.

    Raises: ValueError for a tensor that no row matches, and for a norm or a layer of a block without a bias, for which the
        class would draw a random one.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = next((re.sub(f"^{row}", theirs, name) for row, theirs in table if re.match(row, name)), None)
        if theirs is None:
            raise ValueError(f"model.{name} has no counterpart in {kind}")
        lacks_bias = _HAS_BIAS.fullmatch(theirs) and f"{name.removesuffix('weight')}bias" not in tensors
        if lacks_bias and (without_bias is None or not re.search(without_bias, name)):
            raise ValueError(f"model.{name} has no bias; {kind} has one")
        parts = re.fullmatch(r"(.*)<(.*)>(.*)", theirs)
        if parts is None:
            found[theirs] = tensor
            continue
        alternatives = parts[2].split("|")
        for part, chunk in zip(alternatives, tensor.chunk(len(alternatives)), strict=True):
            found[f"{parts[1]}{part}{parts[3]}"] = chunk.clone()  # safetensors refuses shared memory
    return found
