"""Next-token prediction on the text encoder: GPT (Radford et al. 2018)."""

from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.losses import token_cross_entropy
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings, Terms
from mmpretrain.objectives.token_targets import next_tokens, true_positions


class CausalLM(nn.Module):
    """Predict each token from those before it; the vocabulary's matrix is that of the encoder's embedding.

    L = - sum_t log p(x_t | x_1 ... x_{t-1}), per predicted token of the whole batch

    Args:
        model: its text encoder must be causal.
        stream: where the texts come from.

    Raises: ValueError if the text encoder is missing or sees both ways.
    """

    perplexity = True

    def __init__(self, model: ImageTextModel, stream: str = "pairs", config_path: str = "objective.causal_lm") -> None:
        super().__init__()
        if model.text is None or not model.text.causal:
            raise ValueError(f"{config_path} needs a causal text encoder; set model.text.causal=true")
        self.streams = (stream,)

    def count(self, batch: Batch) -> Tensor:
        """The number of tokens of a micro-batch that have one before them."""
        _, lengths = batch.texts(self.streams[0])
        return (lengths - 1).clamp(min=0).sum()

    def loss(self, encodings: Encodings) -> Terms:
        """The sum of the cross-entropies, and of the hits as `accuracy`."""
        (stream,) = self.streams
        labels, is_label = next_tokens(*encodings.batch.texts(stream))
        predicted = true_positions(is_label, encodings.num_terms(self))
        states = encodings.text(stream).tokens[predicted]
        loss, hits = token_cross_entropy(states, encodings.token_embeddings, labels[predicted])
        return loss, {"accuracy": hits}
