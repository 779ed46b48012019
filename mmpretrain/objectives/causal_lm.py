"""Next-token prediction with the text encoder: GPT (Radford et al. 2018)."""

from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.losses import token_cross_entropy
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings, Terms
from mmpretrain.objectives.token_targets import check_tied_head, next_tokens, true_positions


class CausalLM(nn.Module):
    """Causal language modelling: predict each token from the tokens before it.

    L = - sum_t log p(x_t | x_1 ... x_{t-1}), per predicted token of the whole batch

    The output matrix is the encoder's token embedding matrix.

    Args:
        model: its text encoder must be causal.
        stream: data stream of the texts.

    Raises: ValueError if the text encoder is missing or bidirectional, or its embeddings have another width than its states.
    """

    perplexity = True

    def __init__(self, model: ImageTextModel, stream: str = "pairs", config_path: str = "objective.causal_lm") -> None:
        super().__init__()
        if model.text is None or not model.text.causal:
            raise ValueError(
                f"{config_path} needs a causal text encoder; set model.text.causal=true, or choose another model.text"
            )
        check_tied_head(model.text, config_path)
        self.streams = (stream,)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of predicted tokens of a micro-batch: all tokens but the first of each text."""
        _, lengths = batch.texts(self.streams[0])
        return (lengths - 1).clamp(min=0).sum()

    def loss(self, encodings: Encodings) -> Terms:
        """Return the sum of the cross-entropies, and the number of correct predictions as `accuracy`."""
        (stream,) = self.streams
        labels, is_label = next_tokens(*encodings.batch.texts(stream))
        predicted = true_positions(is_label, encodings.num_terms(self))
        states = encodings.text(stream).tokens[predicted]
        loss, hits = token_cross_entropy(states, encodings.token_embeddings, labels[predicted])
        return loss, {"accuracy": hits}
