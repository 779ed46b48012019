"""Masked language modelling: BERT (Devlin et al. 2019), with a new mask at every visit as in RoBERTa (Liu et al. 2019)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.losses import token_cross_entropy
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import TokenMaskSpec, chosen_tokens
from mmpretrain.objectives.base import Decode, Encodings, Example, Terms, TokenIds
from mmpretrain.objectives.token_targets import check_tied_head, true_positions
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress


class MLM(nn.Module):
    """Masked language modelling: predict chosen tokens, most of which are hidden, from the tokens around them.

    L = - sum over chosen t of log p(x_t | x with the chosen ones hidden), per chosen token of the whole batch

    Args:
        model: its text encoder must be bidirectional (`model.text.causal=false`).
        mask_ratio: probability with which a token is chosen, or a schedule of it.
        replaced, randomised: fractions of the chosen tokens that become the mask token and a random token; the rest is
            unchanged.
        whole_words: choose whole words instead of single tokens.
        mask_id: id of the mask token. None: the tokenizer's or, if it has none, the last row of the encoder's embedding,
            which is outside the tokenizer's vocabulary if `model.text.vocab_size` is larger.
        stream: data stream of the texts.

    Raises: ValueError if the text encoder is causal or missing or its embeddings have another width than its states,
        `mask_ratio` is not inside (0, 1), or `replaced` and `randomised` are negative or add up to more than 1.
    """

    perplexity = True

    def __init__(
        self,
        model: ImageTextModel,
        mask_ratio: Scheduled = 0.15,
        replaced: float = 0.8,
        randomised: float = 0.1,
        whole_words: bool = False,
        mask_id: int | None = None,
        stream: str = "pairs",
        config_path: str = "objective.mlm",
    ) -> None:
        super().__init__()
        if model.text is None or model.text.causal:
            raise ValueError(
                f"{config_path} needs a bidirectional text encoder; set model.text.causal=false or choose another "
                "model.text, and leave out causal_lm and captioning, which need a causal one"
            )
        check_tied_head(model.text, config_path)
        self._mask_ratio = ScheduledValue(mask_ratio, f"{config_path}.mask_ratio", above=0, below=1)
        if min(replaced, randomised) < 0 or replaced + randomised > 1:
            raise ValueError(
                f"{config_path} has replaced={replaced}, randomised={randomised}; expected fractions whose sum is at most 1"
            )
        self.streams, self._config_path = (stream,), config_path
        vocab_size = model.text.vocab_size
        self._mask_id = mask_id
        self._spec = TokenMaskSpec(
            "mlm",
            self._mask_ratio.values[0],
            vocab_size - 1 if mask_id is None else mask_id,
            vocab_size,
            replaced,
            randomised,
            whole_words,
        )
        width = model.text.width
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def set_tokenizer(self, tokenizer: TokenIds) -> None:
        """Set the mask token, and the vocabulary from which random tokens are drawn, from the tokenizer.

        Raises: ValueError if the mask id is an ordinary token of the tokenizer, or outside the encoder's embedding.
        """
        rows = self.bias.numel()
        mask_id = self._mask_id
        if mask_id is None:
            mask_id = rows - 1 if tokenizer.mask_id is None else tokenizer.mask_id
        if not 0 <= mask_id < rows:
            raise ValueError(
                f"{self._config_path}.mask_id is {mask_id}; expected one of the {rows} rows of model.text.vocab_size"
            )
        if mask_id < tokenizer.vocab_size and mask_id != tokenizer.mask_id:
            raise ValueError(
                f"{self._config_path} has id {mask_id} as its mask token, but the tokenizer uses it for another token; "
                f"expected a row of its own: model.text.vocab_size={tokenizer.vocab_size + 1}"
            )
        self._spec = replace(self._spec, mask_id=mask_id, vocab_size=min(rows, tokenizer.vocab_size))

    def mask(self, progress: TrainingProgress) -> TokenMaskSpec:
        """Return the parameters of the token mask at `progress`."""
        return replace(self._spec, ratio=self._mask_ratio(progress))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of chosen tokens of a micro-batch."""
        samples = batch.streams[self.streams[0]]
        text, lengths = batch.texts(self.streams[0])
        return chosen_tokens(
            text.shape[1], lengths, samples.seeds, self.mask(batch.progress), samples.word_starts
        ).sum()

    def predict(self, encodings: Encodings) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute the head's states of the chosen tokens, before the product with the vocabulary.

        Returns: (states [n, d]; the tokens' rows and columns, int64 [n] each).
        """
        (stream,) = self.streams
        mask = self.mask(encodings.batch.progress)
        chosen = true_positions(encodings.token_mask(stream, mask).chosen, encodings.num_terms(self))
        # Select the predicted tokens here: the product with the vocabulary is the most expensive one.
        states = encodings.text(stream, mask).tokens[chosen]
        return self.norm(F.gelu(self.dense(states))), chosen

    def examples(self, encodings: Encodings, decode: Decode) -> list[Example]:
        """Return each text with its chosen tokens as `[prediction → original]`."""
        text, lengths = encodings.batch.texts(self.streams[0])
        states, chosen = self.predict(encodings)
        logits = F.linear(states, encodings.token_embeddings, self.bias)
        predicted = torch.full_like(text, -1).index_put(chosen, logits.argmax(-1)).tolist()
        examples = []
        for row, length in enumerate(lengths.tolist()):
            words = [
                decode([token]) if guess < 0 else f"[{decode([guess])} → {decode([token])}]"
                for token, guess in zip(text[row, :length].tolist(), predicted[row], strict=False)
            ]
            examples.append(Example([], " ".join(word for word in words if word)))
        return examples

    def loss(self, encodings: Encodings) -> Terms:
        """Return the sum of the chosen tokens' cross-entropies, and the number of correct predictions as `accuracy`."""
        states, chosen = self.predict(encodings)
        text, _ = encodings.batch.texts(self.streams[0])
        loss, hits = token_cross_entropy(states, encodings.token_embeddings, text[chosen], self.bias)
        return loss, {"accuracy": hits}
