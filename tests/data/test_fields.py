"""Members of samples to captions, labels and fields; and every refusal is a BadSample, never another error."""

import json

import ftfy
import pytest

from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import check_caption_field, decode_captions, read_json_field, read_label


def test_captions_of_text() -> None:
    assert decode_captions("  Ünï 🐈 \n".encode(), "txt") == ["Ünï 🐈"]
    assert decode_captions(b"a cat\na dog\n", "txt") == ["a cat\na dog"]


def test_captions_of_lines() -> None:
    assert decode_captions(b" a cat\r\n\nb\n", "txt.lines") == ["a cat", "b"]
    check_caption_field("txt.lines", "caption")
    with pytest.raises(ValueError, match=r"^caption is 'txt\.words'; expected a member such as txt, its lines"):
        check_caption_field("txt.words", "caption")


@pytest.mark.parametrize(
    ("value", "field", "expected"),
    [
        ({"caption": " a cat "}, "json.caption", ["a cat"]),
        ({"captions": ["a", " ", "b ", None, 3]}, "json.captions", ["a", "b"]),
        ({"meta": {"alt": {"en": "deep"}}}, "json.meta.alt.en", ["deep"]),
    ],
)
def test_captions_of_json(value: object, field: str, expected: list[str]) -> None:
    assert decode_captions(json.dumps(value).encode(), field) == expected


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"", "txt", "caption field 'txt' is empty"),
        (b" \n\t", "txt", "caption field 'txt' is empty"),
        (b" \n\n", "txt.lines", r"caption field 'txt\.lines' is empty"),
        (b"abc\xff", "txt.lines", "txt member is not UTF-8"),
        ("a cat".encode("utf-16-le"), "txt", "txt member has NULs, as UTF-16 has; convert it to UTF-8"),
        (b"abc\xff", "txt", "txt member is not UTF-8 .* at byte 3"),
        (b"{", "json.caption", "json member does not parse"),
        (b"\xff\xfe{", "json.caption", "json member does not parse"),
        (b'{"b": 1, "a": 2}', "json.caption", r"json has no field 'caption' \(it has: a, b\)"),
        (b"[1]", "json.caption", r"json has no field 'caption' \(it has: list\)"),
        (b'{"a": "text"}', "json.a.b", r"json has no field 'a\.b' \(it has: str\)"),
        (b'{"caption": null}', "json.caption", r"caption field 'json\.caption' is empty"),
        (b'{"caption": []}', "json.caption", "is empty"),
        (b'{"caption": ["", " "]}', "json.caption", "is empty"),
        (b'{"caption": 7}', "json.caption", "is empty"),
        ("\u200b\u200d\ufeff".encode(), "txt", "is empty .it has no visible character"),
        ("\u202e\u2066 \x1b\u00ad\ufe0f\u3164".encode(), "txt", "is empty"),
        (json.dumps({"caption": ["\u200b", "\u2028"]}).encode(), "json.caption", "is empty"),
        (b'{"caption": "\\ud800"}', "json.caption", "is empty"),
        (b"[" * 100_000, "json.caption", "json member does not parse .nested too deeply"),
        (b'{"a":' * 100_000, "json.caption", "json member does not parse .nested too deeply"),
        (b"9" * 100_000, "json.caption", "json"),
    ],
)
def test_a_sample_without_caption_is_refused_with_the_reason(data: bytes, field: str, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_captions(data, field)


@pytest.mark.parametrize("data", [b"abc\xff", "a cat".encode("utf-16"), "a cat".encode("utf-16-le")])
def test_text_of_another_encoding_has_a_code_of_its_own(data: bytes) -> None:
    with pytest.raises(BadSample) as error:
        decode_captions(data, "txt")
    assert error.value.code == "caption_encoding"


@pytest.mark.parametrize(
    "text", ["\u2764\ufe0f", "\u200bcat", "1\u20e3", "\U0001f468\u200d\U0001f469", "\ue000", "\u0e33"]
)
def test_a_caption_with_one_visible_character_stays_as_it_is(text: str) -> None:
    assert decode_captions(text.encode(), "txt") == [text]


def test_half_of_a_surrogate_pair_is_replaced_as_cleaning_does() -> None:
    """JSON can escape one alone, as captions that were cut in other encodings have them; no encoding has such text."""
    data = rb'{"caption": "cut \ud83d", "label": "\ude00x", "whole": "\ud83d\ude00"}'
    assert decode_captions(data, "json.caption") == ["cut \ufffd"] == [ftfy.fix_text("cut \ud83d")]
    assert decode_captions(data, "json.whole") == ["\U0001f600"]
    assert read_label(data, "json.label") == "\ufffdx"


def test_of_many_or_long_fields_some_are_named() -> None:
    data = json.dumps({f"{i:03d}": 0 for i in range(500)} | {"\n" * 1000: 0}).encode()
    with pytest.raises(BadSample, match=r"\(it has: .*, 008 and 491 more\)$") as error:
        read_json_field(data, "caption")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_json_field_of_any_type_is_read() -> None:
    assert read_json_field(b'{"label": 7, "deep": {"list": [1]}}', "label") == 7
    assert read_json_field(b'{"label": 7, "deep": {"list": [1]}}', "deep.list") == [1]
