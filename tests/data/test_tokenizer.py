"""CLIP's tokens and those of Hugging Face, against open_clip's own tokenizer."""

import html
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from mmpretrain.data import tokenizer as module
from mmpretrain.data.tokenizer import ClipTokenizer, FileTokenizer, HuggingFaceTokenizer
from tests import tokenizers

TEXTS = [
    "a photo of a cat",
    "",
    "   spaces \t and\nlines  ",
    "Ünïcödé, 中文 und emoji 🐈‍⬛!",
    "it's 1,000 dogs' <html> &amp; entities",
    "word " * 100,
    "!" * 90,
    "internationalization " * 9,
]


ALPHABETS = {
    "ascii": "".join(map(chr, range(128))),
    "markup": "&<>;#lt gamp quot x0123 ",
    "latin": "aB\u00e9\u00c3\u00a9\u00df\u0130\u01c5 '\u2019s-",  # with mojibake and letters whose lower case is longer
    "greek": "\u03a3\u03b1\u03a3 .",  # a sigma's lower case depends on what follows
    "spaces": "ab \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u200b\ufeff\u3000",
    "wide": "\u4e2d\u6587\uff21\ufb01\U0001f408\u200d\U0001f3fd\u0301 e",
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_ids_of_any_text_are_open_clips(alphabet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are remembered, a few of them only: ids do not depend on which."""
    monkeypatch.setattr(module, "_MAX_KNOWN_WORDS", 100)
    rng = random.Random(alphabet)
    pieces = [*ALPHABETS[alphabet], "<start_of_text>", "<end_of_text>", "it's", "I'LL", "&amp;amp;amp;lt;", "don't 3rd"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(1000)]
    tokenizer, reference = ClipTokenizer(), SimpleTokenizer(context_length=77)
    ids, lengths = tokenizer(texts)
    assert torch.equal(torch.nn.functional.pad(ids, (0, 77 - ids.shape[1])), reference(texts))
    assert len(tokenizer._known_words) <= 100 and len(tokenizer._bpe.cache) <= 100 + 2 * 40
    for row in rng.choices(range(len(texts)), k=100):
        assert tokenizer([texts[row]])[0][0].tolist() == ids[row, : lengths[row]].tolist()


@pytest.mark.parametrize("context_length", [3, 8, 77, 128])
def test_ids_are_open_clips(context_length: int) -> None:
    ids, lengths = ClipTokenizer(context_length)(TEXTS)
    reference = SimpleTokenizer(context_length=context_length)
    expected = reference(TEXTS)
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.shape == (len(TEXTS), int(lengths.max()))
    assert torch.equal(torch.nn.functional.pad(ids, (0, context_length - ids.shape[1])), expected)
    assert torch.equal(lengths, (expected == reference.eot_token_id).int().argmax(1) + 1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(["ab", "aA", "etaoinshrdlu", "\U0001f60d\U0001f602", "\u4e2d\u6587", "!?."]), st.data())
def test_ids_of_a_long_word_are_open_clips(alphabet: str, data: st.DataObject) -> None:
    """They are merged in another way than those of short ones."""
    word = data.draw(st.text(alphabet, min_size=65, max_size=300))
    assert LONG_CONTEXT([word])[0][0].tolist()[1:-1] == REFERENCE.encode(word)


LONG_CONTEXT, REFERENCE = ClipTokenizer(2000), SimpleTokenizer()


def test_pairs_are_merged_rank_by_rank() -> None:
    """Where one token comes about in two ways, a pair with it may come before the one that made it."""
    ranks = {("abc", "a"): 0, ("b", "c"): 1, ("a", "bc"): 2}
    assert module._merged([*"abcabc"], ranks) == ["abc", "abc"]
    assert module._merged([*"abca"], ranks) == ["abca"]
    assert module._merged([*"aaaaa"], {("a", "a"): 0}) == ["aa", "aa", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000)),
        "&" + "amp;" * 25_000,
        "\u00e9 " * 4_000_000,
        "\U0001f60d" * 100_000,
        "\ud83d" * 100_000,
    ],
    ids=["letters", "entities", "megabytes", "emoji", "surrogates"],
)
def test_a_text_of_any_length_is_encoded_at_once(text: str, tmp_path: Path) -> None:
    """Of these open_clip's own encoding takes minutes, or would."""
    pytest.importorskip("transformers")
    folder = str(tokenizers.hugging_face_tokenizer(tmp_path))
    file = FileTokenizer(f"{folder}/tokenizer.json", pad="</s>", end="</s>")
    started = time.perf_counter()
    assert ClipTokenizer()([text])[1].tolist() == [3 if text[0] == "&" else 77]  # nested ampersands are one
    assert HuggingFaceTokenizer(folder)([text])[1].tolist() == [2 if text[0] == "&" else 77]
    if text[0] != "\ud83d":  # no caption has any: see decode_captions
        assert file([text])[1].tolist() == [77]
    assert time.perf_counter() - started < 20  # it takes less than one


def test_what_is_cut_changes_no_id() -> None:
    tokenizer, reference = ClipTokenizer(), SimpleTokenizer(context_length=77)
    texts = [
        "&" + "amp;" * 200 + " <b>",
        "&" + "AMP;#38;#x26;amp;" * 60,
        "a" + " " * 16_000 + "word " * 5_000,
        "Ã© caf\u00e9 " * 4_000,
    ]
    ids, _ = tokenizer(texts)
    assert torch.equal(torch.nn.functional.pad(ids, (0, 77 - ids.shape[1])), reference(texts))


def test_long_words_are_not_remembered() -> None:
    tokenizer = ClipTokenizer()
    tokenizer(["a" * 65, "b" * 64, "c" * 10_000 + " d"])
    assert list(tokenizer._known_words) == ["b" * 64]
    assert max(map(len, tokenizer._bpe.cache)) <= 64


def test_the_length_is_counted_where_padding_is_a_real_token() -> None:
    """Id 0 is '!', so that nobody can tell padding by looking at ids."""
    tokenizer = ClipTokenizer()
    ids, lengths = tokenizer(["! ! !", "a b c d e f g"])
    assert lengths.tolist() == [5, 9]
    assert tokenizer.vocab_size == SimpleTokenizer().vocab_size == 49408
    assert tokenizer.decode(ids[0, : lengths[0]].tolist()) == "! ! !"


def test_a_text_has_the_same_ids_whatever_stands_beside_it() -> None:
    tokenizer = ClipTokenizer()
    together, lengths = tokenizer(TEXTS)
    for row, text in enumerate(TEXTS):
        alone, length = tokenizer([text])
        assert length[0] == lengths[row] and torch.equal(alone[0], together[row, : lengths[row]])


def test_decode_gives_the_text_back_without_special_tokens() -> None:
    tokenizer = ClipTokenizer()
    ids, lengths = tokenizer(["A photo of two cats"])
    assert tokenizer.decode(ids[0, : lengths[0]].tolist()) == "a photo of two cats"


@pytest.mark.parametrize("context_length", [-1, 0, 2])
def test_a_context_too_short_for_a_token_is_refused(context_length: int) -> None:
    with pytest.raises(ValueError, match=f"context_length is {context_length}; expected at least 3"):
        ClipTokenizer(context_length)


NUMBERS = ["&#{};", "&#{}", "&amp;#{};", "&amp;amp;#{}", "\uff06#{};", "&#x{};", "&#X{}", "&#" + "&#51;" * 4400 + "{};"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_character_reference_of_any_length_is_read(number: str, tmp_path: Path) -> None:
    """Python reads no decimal number of more than 4,300 digits."""
    tokenizer = ClipTokenizer(context_length=500)
    assert tokenizer.decode(tokenizer([f"a {number.format('3' * 5000)} cat"])[0][0].tolist()) == "a \ufffd cat"
    zeros = number.format("0" * 5000 + ("42" if "x" in number.lower() else "66"))
    if "51" not in number:
        assert tokenizer.decode(tokenizer([f"a {zeros} cat"])[0][0].tolist()) == "a b cat"
    pytest.importorskip("transformers")
    hugging_face = HuggingFaceTokenizer(str(tokenizers.hugging_face_tokenizer(tmp_path)), context_length=12)
    assert hugging_face([f"a {number.format('3' * 5000)} cat"])[1] <= 12


@given(st.lists(st.sampled_from([*"&#xX019af; ", "&#", "&#x", "0" * 20, "65", "1114112"]), max_size=14).map("".join))
def test_short_character_references_are_read_as_pythons(text: str) -> None:
    assert module._unescaped(text) == html.unescape(text)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_a_tokenizer_of_hugging_face_gives_open_clips_ids(clean: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = str(tokenizers.hugging_face_tokenizer(tmp_path))
    texts = ["A  red circle, above\nthe square.", "star", "a long long long long long long long caption of a ring"]
    ours = HuggingFaceTokenizer(folder, context_length=12, clean=clean)
    theirs = HFTokenizer(folder, context_length=12, clean=clean)(texts)
    ids, lengths = ours(texts)
    assert lengths.max() == ids.shape[1] == 12
    for row, expected, length in zip(ids, theirs, lengths.tolist(), strict=True):
        assert row[:length].tolist() == expected[:length].tolist()
        assert set(row[length:].tolist()) | set(expected[length:].tolist()) <= {ours.pad_id}
    assert (ours.pad_id, ours.end_id, ours.mask_id) == (1, 1, None)
    assert ours.decode(ids[1].tolist()) == "star"


def test_a_tokenizer_of_hugging_face_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"cannot be loaded .*; expected a local folder or a name"):
        HuggingFaceTokenizer(str(tmp_path))


def words(tokenizer: Any, text: str) -> list[str]:
    """The text cut where the tokenizer says that words begin."""
    ids, lengths = tokenizer([text])
    starts = tokenizer.word_starts(ids)[0, : lengths[0]].tolist()
    pieces: list[list[int]] = []
    for number, is_start in zip(ids[0, : lengths[0]].tolist(), starts, strict=True):
        if is_start:
            pieces.append([])
        pieces[-1].append(number)
    return [piece for piece in (tokenizer.decode(part) for part in pieces) if piece]


def test_words_begin_where_they_do(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = "internationalization of a sesquipedalian circle"
    assert words(ClipTokenizer(), text) == text.split()
    folder = tokenizers.hugging_face_tokenizer(tmp_path, ["a red circle"])
    assert words(HuggingFaceTokenizer(str(folder)), text) == text.split()


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_a_tokenizer_that_ends_no_text_is_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tokenizers.hugging_face_tokenizer(tmp_path, ["a red circle"])
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "post_processor": None}))
    with pytest.raises(ValueError, match=r"does not end a text with .*; expected a tokenizer that does"):
        HuggingFaceTokenizer(str(folder)) if name == "." else FileTokenizer(str(file), pad="</s>", end="</s>")


def test_a_word_behind_a_new_line_is_a_word(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tokenizers.hugging_face_tokenizer(tmp_path, ["one two\nthree four"])
    assert words(HuggingFaceTokenizer(str(folder), clean="canonicalize"), "one two") == ["one", "two"]
    tokenizer = FileTokenizer(str(folder / "tokenizer.json"), pad="</s>", end="</s>")
    assert words(tokenizer, "one two\nthree four") == ["one", "two", "three", "four"]
