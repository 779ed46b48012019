"""Image-to-text and text-to-image retrieval."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context
from mmpretrain.scores import Score, mean_score


def match_ranks(queries: Tensor, gallery: Tensor, pairs: Tensor, chunk_size: int = 1024) -> Tensor:
    """Return the number of wrong answers ranked before each query's best correct answer. Ties count against the model.

    Args:
        queries: embeddings of the queries [q, e].
        gallery: embeddings of the possible answers [g, e].
        pairs: indices (query, gallery item) of matching pairs, int64 [p, 2]; each query has at least one.
        chunk_size: number of queries compared at once; memory is proportional to chunk_size x g.

    Returns: int64 [q]; 0 is a hit at rank one. NaN similarities also count against the model.
    """
    ranks = []
    for start in range(0, len(queries), chunk_size):
        similarity = queries[start : start + chunk_size] @ gallery.T
        inside = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(similarity))]
        rows, columns = inside[:, 0] - start, inside[:, 1]
        best = similarity.new_full((len(similarity),), -torch.inf)
        best = best.scatter_reduce(0, rows, similarity[rows, columns], "amax")
        wrong = torch.ones_like(similarity, dtype=torch.bool)
        wrong[rows, columns] = False
        ranks.append((~(similarity < best[:, None]) & wrong).sum(1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=queries.device)


class Retrieval:
    """Compute recall at k for image-to-text and text-to-image retrieval.

    Recall at k is the fraction of queries with a correct answer among the first k. A text shared by several images is one
    query with several correct answers, as is an image with several texts.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        ks: values of k.
        chunk_size: number of queries compared at once.

    Raises: UsageError if `ks` is empty, or if a k or `chunk_size` is below 1.
    """

    needs = "caption"

    def __init__(
        self, data: Sequence[str] | None = None, ks: Sequence[int] = (1, 5, 10), chunk_size: int = 1024
    ) -> None:
        if not ks:
            raise UsageError("ks is []; expected at least one rank, such as ks=[1,5,10]")
        for k in ks:
            check_number("ks", k, at_least=1)
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.ks = ks
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions."""
        return context.pair_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `text_retrieval_recall@k` (image to text) and `image_retrieval_recall@k` (text to image)."""
        embedded = context.embedded(name)
        images, texts, pairs = embedded.images, embedded.texts, embedded.pairs
        of_texts = embedded.labels.new_full((len(texts),), -1)
        of_texts[pairs[:, 1].flip(0)] = embedded.labels[pairs[:, 0].flip(0)]  # the class of a text's first image
        return {
            **self._recalls("text_retrieval", images, texts, pairs, embedded.labels),
            **self._recalls("image_retrieval", texts, images, pairs.flip(1), of_texts),
        }

    def _recalls(self, name: str, queries: Tensor, gallery: Tensor, pairs: Tensor, classes: Tensor) -> dict[str, Score]:
        """Compute the recalls from each rank's share of the queries, whose `classes` are int64 [q]."""
        asked = pairs[:, 0].unique()
        mine = asked[distributed.share(len(asked))]
        number = torch.full((len(queries),), -1, dtype=torch.int64, device=pairs.device)
        number[mine] = torch.arange(len(mine), device=pairs.device)
        matches = pairs[number[pairs[:, 0]] >= 0]
        matches = torch.stack([number[matches[:, 0]], matches[:, 1]], dim=1)
        ranks = distributed.gather_ragged_rows(match_ranks(queries[mine], gallery, matches, self.chunk_size))
        return {f"{name}_recall@{k}": mean_score(ranks < k, classes[asked]) for k in self.ks}
