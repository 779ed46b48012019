"""Cutting and joining: every word comes back, and no sample is longer than the context."""

import random
from pathlib import Path

import pytest

from data_tools.documents import Document
from data_tools.packing import CountTokens, cut, pack
from data_tools.tokenizers import train_tokenizer
from mmpretrain.data.tokenizer import Tokenizer, tokenizer_of
from tests.tokenizers import hugging_face_tokenizer

ALPHABETS = ["abcdefghij", "éßıİŉ’&;<>", "日本語東京。！", "👩‍👩‍👧🏽🇫🇷", "=-_.?!", "ﷺﬃ㎏\u200b\x01"]


def words_of(text: str) -> int:
    """A count that is easy to follow: a token a word, and two special ones."""
    return len(text.split()) + 2


def counter(kind: str, folder: Path) -> CountTokens:
    """Tokens of a text by CLIP's tokenizer, one of `data_tools tokenizer` and one of Hugging Face's."""
    path = None
    if kind == "file":
        path = str(folder / "tokenizer.json")
        train_tokenizer(iter(["abc def " * 20, "hij abc"]), 300, lowercase=False).save(path)
    elif kind == "hugging_face":
        path = str(hugging_face_tokenizer(folder / "tokenizer", ["abc", "def"]))
    tokenizer: Tokenizer = tokenizer_of(path=path, context_length=100_000)
    return lambda text: int(tokenizer([text])[1])


@pytest.mark.parametrize("kind", ["clip", "file", "hugging_face"])
@pytest.mark.parametrize("context_length", [24, 77])
def test_no_character_is_lost_and_none_is_beyond_the_context(kind: str, context_length: int, tmp_path: Path) -> None:
    count = counter(kind, tmp_path)
    documents = []
    for number in range(12):
        alphabet = random.choice(ALPHABETS[:1] * 3 + ALPHABETS)
        lengths = [random.choice([1, 3, 5, 5, 8, 8, 8, 300]) for _ in range(random.choice([1, 5, 20, 60]))]
        text = " ".join("".join(random.choices(alphabet, k=length)) for length in lengths)
        documents.append(Document(0, number + 1, text))
    samples = list(pack(documents, count, context_length, join=True))
    for sample in samples:
        assert count(sample.text) == sample.num_tokens <= context_length
        assert sample.text == sample.text.strip() != ""
    packed = "".join(sample.text for sample in samples)
    assert "".join(packed.split()) == "".join("".join(document.text.split()) for document in documents)


def test_a_text_is_cut_at_the_end_of_a_sentence_that_is_near() -> None:
    near = "a b c d e f g. h i j k l"
    assert [piece for piece, _ in cut(near, words_of, 10)] == ["a b c d e f g.", "h i j k l"]
    far = "a b. c d e f g h i j k l"
    assert [piece for piece, _ in cut(far, words_of, 10)] == ["a b. c d e f g h", "i j k l"]
    number = "a b c d e f 1.5 h i j k l"
    assert [piece for piece, _ in cut(number, words_of, 10)] == ["a b c d e f 1.5 h", "i j k l"]
    whole = "a b c d e f g. h"
    assert [piece for piece, _ in cut(whole, words_of, 10)] == [whole]


def test_a_word_that_is_alone_too_long_is_cut_inside() -> None:
    pieces = list(cut(f"a {'x' * 25} b c", lambda text: len(text) + 2, 12))
    assert pieces == [("a", 3), ("x" * 10, 12), ("x" * 10, 12), ("x" * 5 + " b c", 11)]


def test_the_cost_of_an_endless_word_is_that_of_its_length() -> None:
    longest = 0

    def count(text: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return len(text) + 2

    assert len(list(cut("x" * 5000, count, 12))) == 500
    assert longest <= 8 * 12


def test_a_context_that_holds_no_character_is_named() -> None:
    with pytest.raises(ValueError, match=r"--context-length 3: '😀' alone takes 6 tokens .* expected at least that"):
        list(cut("😀", lambda text: 6 * len(text), 3))


def test_only_documents_that_are_longer_than_a_sample_are_cut() -> None:
    texts = ["a b", "c d", "e f g h i", "j k l m n o p q r", "s", "t"]
    documents = [Document(0, line, text) for line, text in enumerate(texts, start=1)]
    samples = [(sample.key, sample.text) for sample in pack(documents, words_of, 8, join=True)]
    assert samples == [
        ("00000-000000001-00000", "a b\nc d"),
        ("00000-000000003-00000", "e f g h i"),
        ("00000-000000004-00000", "j k l m n o"),
        ("00000-000000004-00001", "p q r\ns\nt"),
    ]
    alone = [sample.text for sample in pack(documents, words_of, 8, join=False)]
    assert alone == ["a b", "c d", "e f g h i", "j k l m n o", "p q r", "s", "t"]
