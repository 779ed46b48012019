"""Models of Hugging Face's `transformers` from a local folder. The hub and remote code are never used."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmpretrain import files
from mmpretrain.batch import Packing
from mmpretrain.errors import check_number
from mmpretrain.models.blocks import of_picks
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.layers import layers_above_by_name

CONFIG_FILE = "config.json"
_MAX_CONFIG_BYTES = 1 << 20
# Fields that do not describe the encoder: other code and files, number types, kernels and labels of classifiers.
_LEFT_OUT = re.compile(
    r"_.*|auto_map|quantization_config|(attn|experts)_implementation|(torch_)?dtype|id2label|label2id|num_labels"
    r"|architectures|transformers_version"
)
_SAME_STATES = 1e-6


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json that describe the model.

    Raises: ValueError if the file is missing, cannot be read, or names no type of model.
    """
    file = Path(folder, CONFIG_FILE)
    if not file.is_file():
        raise ValueError(
            f"path is {str(folder)!r}; expected a local folder with a {CONFIG_FILE}, as save_pretrained writes it"
        )
    fields = files.read_json(file, _MAX_CONFIG_BYTES)
    if not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{file} has no model_type; expected the file as save_pretrained writes it")
    return {name: value for name, value in fields.items() if not _LEFT_OUT.fullmatch(name)}


def huggingface_model(path: str, pretrained: bool = False, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model of Hugging Face without a head, in float32.

    Args:
        path: local folder with config.json and, for `pretrained`, model.safetensors (or shards of it).
        pretrained: load the folder's weights; False: random ones, drawn as the model's class draws them.
        args: fields of the configuration to replace, such as `{num_hidden_layers: 6}`.

    Raises: ValueError if `transformers` is not installed, the folder lacks a file or a weight, or a field is refused.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ValueError("transformers is not installed; pip install 'multimodal-pretrain[huggingface]'") from error
    fields = read_config(path)
    if unknown := sorted(name for name in args or {} if _LEFT_OUT.fullmatch(name) or name == "model_type"):
        raise ValueError(f"args has {unknown[0]!r}, which cannot be replaced; expected fields of the model's shape")
    kind = fields["model_type"]
    with quiet():
        try:
            config = AutoConfig.for_model(**{**fields, **(args or {})})
            config.use_cache = False  # states of earlier tokens are for generation
            if not pretrained:
                model: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
                return model.float()
            model, info = AutoModel.from_pretrained(
                path, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # the libraries below raise errors of their own for damaged files
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"transformers cannot build the {kind} in {path!r} ({reason})") from error
    # A pooler that the weights lack is random. `HuggingFaceText` leaves it out.
    lacking = [
        name for name in [*info["missing_keys"], *info["mismatched_keys"]] if not str(name).startswith("pooler.")
    ]
    if lacking:
        raise ValueError(
            f"the weights in {path!r} do not fit its {kind}: {len(lacking)} are missing or have another shape, such as "
            f"{sorted(map(str, lacking))[0]}; expected model.safetensors of that model, or pretrained=false"
        )
    return model.float()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and reports of `transformers`; what matters of them is raised as errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if has_bars:
            logging.enable_progress_bar()


def run_on_texts(transformer: nn.Module, ids: Tensor, lengths: Tensor) -> tuple[Any, Tensor]:
    """Run a text model of Hugging Face on token ids int64 [b, L] of texts with `lengths` int64 [b].

    Padding, the positions from `lengths` on, is never attended to.

    Returns: (the model's output; bool [b, L], True where there is a token).
    """
    is_token = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return transformer(input_ids=ids, attention_mask=is_token.long()), is_token


class HuggingFaceText(nn.Module):
    """Text encoder of Hugging Face: BERT, RoBERTa, GPT-2, Llama and others that `AutoModel` builds.

    Causality is measured at construction: changing the last token must leave the states before it unchanged.

    Args:
        path: local folder with config.json, tokenizer.json and, for `pretrained`, model.safetensors (or shards of it).
        pretrained: load the folder's weights; False: random ones.
        context_length: length of the longest text in tokens, start and end included.
        pool: `mean` averages the states of all tokens, `cls` takes that of the first token, `last` that of the end token.
        causal: direction of attention that objectives require, as their presets set it; None accepts both.
        vocab_size: not used, since the folder's model has one. `objective=mlm` sets it for CLIP's tokenizer.
        args: fields of the configuration to replace, such as `{num_hidden_layers: 6}`.

    Raises: ValueError if the model cannot be built, is no text encoder, has fewer positions than `context_length`, is not
        what `causal` says, or is causal and pools its first token.
    """

    def __init__(
        self,
        path: str,
        pretrained: bool = False,
        context_length: int = 77,
        pool: Literal["mean", "cls", "last"] = "mean",
        causal: bool | None = None,
        vocab_size: int | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.transformer: Any = cast(Any, huggingface_model(path, pretrained, args))
        config = self.transformer.config
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "vocab_size"):
            raise ValueError(
                f"the {config.model_type} in {path!r} is no text encoder; expected one such as BERT or GPT-2"
            )
        if getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler = None  # its states would not be read
        self.vocab_size: int = len(self.token_embeddings)
        self.width: int = config.hidden_size
        self.context_length = context_length
        self.pool = pool
        check_number("model.text.context_length", context_length, at_least=2, at_most=self._num_positions())
        is_causal = self._is_causal()
        self.causal = bool(causal) if is_causal is None else is_causal
        if causal is not None and self.causal != causal:
            raise ValueError(
                f"model.text.causal is {str(causal).lower()}, but the {config.model_type} in {path!r} is "
                f"{'causal' if self.causal else 'bidirectional'}; expected another model, or objectives that do not need it"
            )
        if self.causal and pool == "cls":
            raise ValueError(
                f"model.text.pool is cls, but the {config.model_type} in {path!r} is causal; expected last or mean"
            )

    @property
    def token_embeddings(self) -> Tensor:
        """Token embedding matrix, [vocabulary, d]."""
        return cast(Tensor, self.transformer.get_input_embeddings().weight)

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`). Raises: ValueError without blocks."""
        return {f"transformer.{name}": number for name, number in layers_above_by_name(self.transformer).items()}

    def _num_positions(self) -> int | None:
        """Return the number of positions that the model has; None if it has no limit."""
        table = getattr(getattr(self.transformer, "embeddings", None), "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1  # RoBERTa numbers them from its padding id on
        limit = getattr(self.transformer.config, "max_position_embeddings", None)
        return limit if limit is not None and limit > 0 else None  # XLNet has -1

    @torch.no_grad()
    def _is_causal(self) -> bool | None:
        """Return True if another last token leaves the states before it unchanged; None on the meta device."""
        ids = torch.zeros(2, min(3, self.context_length), dtype=torch.int64, device=self.token_embeddings.device)
        ids[1, -1] = self.vocab_size - 1
        if ids.is_meta:
            return None
        self.transformer.eval()
        one, other = self.transformer(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, :-1]
        self.transformer.train()
        return bool((one - other).abs().amax() <= _SAME_STATES * one.abs().amax())

    def forward(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids int64 [b, L] of texts with `lengths` int64 [b]. `packing` is ignored."""
        output, is_token = run_on_texts(self.transformer, ids, lengths)
        states = output.last_hidden_state

        def pooled(_: Encoding) -> Tensor:
            if self.pool == "cls":
                return states[:, 0]
            if self.pool == "last":
                return of_picks(states, (lengths - 1)[:, None])[:, 0]
            return (states * is_token[..., None]).sum(1) / lengths[:, None].to(states.dtype)

        return Encoding(lambda: states, pooled)
