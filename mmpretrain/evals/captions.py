"""Captions that a captioning objective generates for held-out images, against the images' own."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.cider import check_installed, cider
from mmpretrain.evals.embeddings import read_image
from mmpretrain.evals.held_out_batches import blocks, in_evaluation_mode
from mmpretrain.objectives.base import Encodings as AnyEncodings
from mmpretrain.objectives.base import Example
from mmpretrain.reporting import pictures
from mmpretrain.scores import Score, mean_score
from mmpretrain.training.task import Encodings


@runtime_checkable
class Generates(Protocol):
    """Objective that generates a caption for each image of a micro-batch, such as `captioning`."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def generate(self, encodings: AnyEncodings, longest: int = 32, end_id: int | None = None) -> Tensor:
        """Return token ids, int64 [b, L], that begin with the first token of each text."""
        ...


class Captions:
    """Generate a caption for each image by greedy decoding, and compare it with all of the image's captions.

    Args:
        data: names of `data.val` to use; None uses each data set with images and captions.
        objective: name of the objective that generates; None: the first that can.
        longest: maximum number of tokens of a caption, with the start token.
        batch_size: number of images that are captioned at once.
        tokenization: tokens of CIDEr: `words`, or `ptb`, those of COCO's scores (see `cider.cider`).
        num_shown: number of images to show with their captions.

    Raises: UsageError if a number is out of range.
    """

    needs = "caption, and a run with objective=captioning or another that writes captions"
    towers = ("image", "text")

    def __init__(
        self,
        data: Sequence[str] | None = None,
        objective: str | None = None,
        longest: int = 32,
        batch_size: int = 64,
        tokenization: Literal["words", "ptb"] = "words",
        num_shown: int = 8,
    ) -> None:
        check_number("longest", longest, at_least=2)
        check_number("batch_size", batch_size, at_least=1)
        self.data = data
        self.objective = objective
        self.longest = longest
        self.batch_size = batch_size
        self.tokenization = tokenization
        self.num_shown = num_shown

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with images and captions; none if the run has no objective that generates.

        Raises: UsageError if a package or program of CIDEr is missing.
        """
        if self._generator(context) is None:
            return []
        check_installed(self.tokenization)
        return context.pair_sets

    def _generator(self, context: Context) -> Generates | None:
        able = {name: each for name, each in context.objectives.items() if _generates(each)}
        if self.objective is None:
            return next(iter(able.values()), None)
        if self.objective not in able:
            known = ", ".join(able) or "the run has none"
            raise UsageError(f"objective is {self.objective!r}; expected one that generates captions: {known}")
        return able[self.objective]

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `cider` and `caption_exact_match`, and show some images with their captions as the picture `captions`.

        A caption is an exact match if it equals any of the image's but for case and spaces.
        """
        local: list[tuple[int, str, list[str]]] = []
        generator = self._generator(context)
        assert generator is not None
        start, device = _start_token(context), context.model.device
        read = blocks(name, context, generator.streams, ("images", "texts"), self.batch_size)
        with closing(read), context.autocast, in_evaluation_mode(context.model, generator):
            for block in read:
                if not block.numbers:
                    continue
                samples = replace(
                    block.batch.streams[generator.streams[0]],
                    text=torch.full((len(block.numbers), 1), start),
                    lengths=torch.ones(len(block.numbers), dtype=torch.int64),
                    packing=None,
                    word_starts=None,
                )
                batch = replace(block.batch, streams=dict.fromkeys(generator.streams, samples)).to(device)
                ids = generator.generate(Encodings(context.model, batch), self.longest, context.tokenizer.end_id)
                texts = [context.tokenizer.decode(_until(row[1:], context.tokenizer.end_id)) for row in ids.tolist()]
                local += zip(block.numbers, texts, block.captions)
        found = [each for part in distributed.gather_objects(local) for each in part]
        generated, own = [text for _, text, _ in found], [captions for _, _, captions in found]
        # Only one process counts n-grams or starts Java.
        values = distributed.from_main(lambda: cider(generated, own, self.tokenization))
        hits = [_plain(text) in map(_plain, captions) for text, captions in zip(generated, own)]
        if distributed.is_main() and self.num_shown:
            chosen = [found[i] for i in evenly_spread(self.num_shown, len(found))]
            examples = [
                Example([read_image(context.sets[name], number)], f"{text}\n({' / '.join(captions)})")
                for number, text, captions in chosen
            ]
            context.show(name, "captions", pictures.example_page(examples))
        return {"cider": mean_score(values), "caption_exact_match": mean_score(torch.tensor(hits, dtype=torch.float64))}


def _generates(objective: object) -> TypeGuard[Generates]:
    return isinstance(objective, Generates)


def _start_token(context: Context) -> int:
    """Return the token that begins every text. Raises: UsageError if the tokenizer has none."""
    ids, _ = context.tokenizer(["a", "b"])
    if ids[0, 0] != ids[1, 0]:
        raise UsageError(
            "the tokenizer begins texts with their first word, so that there is nothing to generate a caption from; expected "
            "one with a start token, such as python -m data_tools tokenizer makes"
        )
    return int(ids[0, 0])


def _until(ids: Sequence[int], end_id: int | None) -> Sequence[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
