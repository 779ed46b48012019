"""CIDEr (Vedantam et al. 2015) by the package pycocoevalcap, on texts split by words or by COCO's tokenizer."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.errors import UsageError

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


def check_installed(tokenization: Literal["words", "ptb"]) -> None:
    """Raises: UsageError if pycocoevalcap is not installed, or Java, which `ptb` runs."""
    _package()
    if tokenization == "ptb" and shutil.which("java") is None:
        raise UsageError("tokenization is 'ptb', which runs Java, but there is no java on PATH; expected one, or words")


def _package() -> tuple[ModuleType, ModuleType]:
    """Return the modules of CIDEr and of COCO's tokenizer."""
    try:
        from pycocoevalcap.cider import cider
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise UsageError(
            f"CIDEr needs a package that is not installed ({error}): pip install 'multimodal-pretrain[captions]'"
        ) from error
    return cider, ptbtokenizer


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenization: Literal["words", "ptb"]
) -> Tensor:
    """Compute the CIDEr of each candidate, float64 [n], 10 at best. Their mean is the corpus's.

    The document frequencies are those of the references, so that a value depends on the whole corpus: n-grams that all
    images share count nothing.

    Args:
        candidates: one text for each image.
        references: one or several texts for each image.
        tokenization: `words` splits at spaces and punctuation; `ptb` is the Penn Treebank tokenizer that COCO's scores use,
            in Java. Both are lower-case and without punctuation.

    Raises: UsageError if pycocoevalcap or Java is missing or fails.
    """
    check_installed(tokenization)
    scorer, _ = _package()
    split = _ptb if tokenization == "ptb" else _words
    texts = iter(split([*candidates, *(text for own in references for text in own)]))
    found = {i: [next(texts)] for i in range(len(candidates))}
    expected = {i: [next(texts) for _ in own] for i, own in enumerate(references)}
    if not any(map(any, expected.values())):  # the package fails without any word
        return torch.zeros(len(candidates), dtype=torch.float64)
    _, scores = scorer.Cider().compute_score(expected, found)
    return torch.from_numpy(scores)


def _words(texts: Sequence[str]) -> list[str]:
    """Return the lower-case words of each text, joined by spaces."""
    return [" ".join(_WORD.findall(text.lower())) for text in texts]


def _ptb(texts: Sequence[str]) -> list[str]:
    """Return the tokens of each text that are no punctuation, joined by spaces, as pycocoevalcap's PTBTokenizer does.

    The package's own function writes a file into its folder, which may be read-only.
    """
    _, ptb = _package()
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(Path(str(ptb.__file__)).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)),
    ]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "\n".join(" ".join(text.split()) for text in texts) + "\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8")
    if done.returncode or done.stdout.count("\n") < len(texts):
        reason = next(iter(done.stderr.strip().splitlines()), "no reason is given")
        raise UsageError(f"java cannot run the PTBTokenizer of pycocoevalcap ({reason}); use tokenization: words")
    tokens = done.stdout.split("\n")[: len(texts)]
    return [" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in tokens]
