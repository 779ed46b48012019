"""Image captioning: CoCa's decoder (Yu et al. 2022) and CapPa's parallel prediction (Tschannen et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.errors import check_number
from mmpretrain.losses import token_cross_entropy
from mmpretrain.models.fusion import FusionDecoder
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.rows import Rows
from mmpretrain.objectives.base import Decode, Encodings, Example, Terms
from mmpretrain.objectives.token_targets import check_tied_head, next_tokens, true_positions
from mmpretrain.seeds import hash64, torch_uniform


class Captioning(nn.Module):
    """Captioning: predict each token of a caption from the image and the tokens before it.

    L = - sum_t log p(x_t | image, x_1 ... x_{t-1}), per predicted token of the whole batch

    The decoder reads the states of the causal text encoder (CoCa's unimodal layers) and attends to the image tokens.

    A fraction of the captions can be predicted in parallel, from the image alone (CapPa). The decoder's input is then a mask
    token at every position of the context, with bidirectional attention: it reveals neither tokens nor their number.

    Args:
        model: its text encoder must be causal.
        decoder_depth, decoder_heads: depth and number of heads of the decoder; its width is the text encoder's.
        num_queries: number of queries that pool the image tokens; 0: no pooling.
        parallel: fraction of the captions that is predicted in parallel; .75 in CapPa.
        stream: data stream of the pairs.

    Raises: ValueError if the text encoder is missing or bidirectional or its embeddings have another width than its states,
        or an argument is out of range.
    """

    perplexity = True

    def __init__(
        self,
        model: ImageTextModel,
        decoder_depth: int = 6,
        decoder_heads: int = 8,
        num_queries: int = 256,
        parallel: float = 0.0,
        stream: str = "pairs",
        config_path: str = "objective.captioning",
    ) -> None:
        super().__init__()
        if model.text is None or not model.text.causal:
            raise ValueError(
                f"{config_path} needs a causal text encoder; set model.text.causal=true or choose another model.text, and "
                "leave out mlm, which needs a bidirectional one"
            )
        check_tied_head(model.text, config_path)
        if not 0 <= parallel <= 1:
            raise ValueError(f"{config_path}.parallel is {parallel}; expected a fraction of the captions, 0 to 1")
        check_number(f"{config_path}.decoder_depth", decoder_depth, at_least=1)
        check_number(f"{config_path}.decoder_heads", decoder_heads, at_least=1)
        check_number(f"{config_path}.num_queries", num_queries, at_least=0)
        if model.text.width % decoder_heads:
            raise ValueError(
                f"{config_path}.decoder_heads is {decoder_heads}; expected a divisor of model.text.width = "
                f"{model.text.width}"
            )
        self.context_length = model.text.context_length
        self.streams = (stream,)
        self.parallel = parallel
        width = model.text.width
        self.decoder = FusionDecoder(width, decoder_depth, decoder_heads, model.image_encoder.width, num_queries)
        if parallel > 0:
            self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
            self.positions = nn.Parameter(torch.randn(model.text.context_length, width) * 0.01)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of predicted tokens of a micro-batch: all tokens but the first of each text."""
        _, lengths = batch.texts(self.streams[0])
        return (lengths - 1).clamp(min=0).sum()

    def generate(self, encodings: Encodings, longest: int = 32, end_id: int | None = None) -> Tensor:
        """Generate captions by greedy decoding from the first token of each text (the start token).

        Args:
            encodings: encodings of the micro-batch; of its texts, only the first tokens are read.
            longest: maximum number of tokens.
            end_id: end token, at which generation stops once every caption has it; None generates `longest` tokens.

        Returns: token ids, int64 [b, L] with L of at most `longest` and the context length.
        """
        (stream,) = self.streams
        ids = encodings.batch.texts(stream)[0][:, :1]
        for length in range(1, min(longest, self.context_length)):
            lengths = torch.full((len(ids),), length, device=ids.device)
            states = self.decode(encodings.with_text(stream, ids, lengths), parallel=0.0)
            ids = torch.cat([ids, (states[:, -1] @ encodings.token_embeddings.T).argmax(-1, keepdim=True)], dim=1)
            if end_id is not None and bool((ids[:, 1:] == end_id).any(1).all()):
                break
        return ids

    def examples(self, encodings: Encodings, decode: Decode) -> list[Example]:
        """Return each image with its generated caption and, in parentheses, its own."""
        (stream,) = self.streams
        images, (text, lengths) = encodings.batch.images(stream), encodings.batch.texts(stream)
        examples = []
        for row, caption in enumerate(self.generate(encodings).tolist()):
            own = text[row, : lengths[row]].tolist()
            end = caption.index(own[-1]) if own[-1] in caption else len(caption)
            examples.append(Example([images[row].cpu()], f"{decode(caption[:end])}\n({decode(own)})"))
        return examples

    def decode(self, encodings: Encodings, parallel: float | None = None) -> Tensor:
        """Compute the decoder's states [b, L, d]; the state at each position predicts the next token.

        Args:
            encodings: encodings of the micro-batch.
            parallel: fraction of the captions that is predicted in parallel; None: the objective's own. Above 0 L is the
                context length.
        """
        (stream,) = self.streams
        parallel = self.parallel if parallel is None else parallel
        samples, (_, lengths) = encodings.samples(stream), encodings.batch.texts(stream)
        image_tokens = encodings.image(stream).tokens
        if parallel == 0:
            states = encodings.text(stream).tokens
            rows = Rows(lengths, states.shape[1], samples.packing)
            mask = rows.mask(is_causal=True)
            return rows.unpack(self.decoder(rows.pack(states), rows, image_tokens, mask, is_causal=mask is None))
        x, mask = (self.mask_token + self.positions).expand(len(lengths), -1, -1), None
        if parallel < 1:
            in_parallel = torch_uniform(samples.seeds, 1, hash64("captioning-parallel"))[:, 0] < parallel
            states = encodings.text(stream).tokens
            states = F.pad(states, (0, 0, 0, self.context_length - states.shape[1]))
            x = torch.where(in_parallel[:, None, None], x.to(states.dtype), states)
            positions = torch.arange(self.context_length, device=x.device)
            mask = (in_parallel[:, None, None] | (positions <= positions[:, None]))[:, None]
        rows = Rows(lengths, self.context_length, None)
        return self.decoder(x, rows, image_tokens, mask, is_causal=False)

    def loss(self, encodings: Encodings) -> Terms:
        """Return the sum of the cross-entropies, and the number of correct predictions as `accuracy`."""
        labels, is_label = next_tokens(*encodings.batch.texts(self.streams[0]))
        predicted = true_positions(is_label, encodings.num_terms(self))
        states = self.decode(encodings)[predicted]
        loss, hits = token_cross_entropy(states, encodings.token_embeddings, labels[predicted])
        return loss, {"accuracy": hits}
