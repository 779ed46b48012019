"""Decoding of the members of a sample that are not images: fields of JSON, labels and captions."""

import json
import re
import unicodedata
from typing import Any

from mmpretrain.data.decode import BadSample
from mmpretrain.data.source import SampleSource

MAX_CAPTION_CHARACTERS = 1 << 20
"""Tokenizing a text of this length takes about a second."""


def read_json_field(data: bytes, path: str) -> Any:
    """Return the value at a dotted path in a JSON member.

    Raises: BadSample if the bytes are not a JSON object or it lacks the path.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise BadSample("its json member does not parse (nested too deeply)", "json_damaged") from error
    except ValueError as error:
        raise BadSample(f"its json member does not parse ({error})", "json_damaged") from error
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadSample(f"its json has no field {path!r} (it has: {_fields(value)})", "json_field")
        value = value[part]
    return value


def _fields(value: Any) -> str:
    """List up to ten fields of a parsed JSON object; return the type's name for any other value."""
    if not isinstance(value, dict):
        return type(value).__name__
    names = [name if len(name) <= 40 and name.isprintable() else ascii(name[:40]) for name in sorted(value)[:10]]
    return ", ".join(names) + (f" and {len(value) - 10} more" if len(value) > 10 else "")


def _without_lone_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON escapes can produce and no encoding allows, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me"))  # Unicode's categories
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and a symbol with blank glyphs


def is_visible(text: str) -> bool:
    """Return True if a text has a visible character."""
    return any(unicodedata.category(character) not in _INVISIBLE and character not in _BLANK for character in text)


def read_label(data: bytes, field: str) -> str:
    """Return a label as text: the content of a `cls` member, or the value at `json.<dotted path>`.

    Raises: BadSample if the label is missing or empty.
    """
    value = data.decode(errors="replace")
    if field.startswith("json."):
        value = _without_lone_surrogates(str(read_json_field(data, field.removeprefix("json."))))
    if not value.strip():
        raise BadSample(f"its label {field!r} is empty", "label")
    return value.strip()


def check_caption_field(field: str, key: str) -> None:
    """Raise ValueError if a caption field is malformed, such as `json` alone, whose text would become the caption."""
    if field == "json" or not re.fullmatch(r"\w+(\.lines)?|json(\.[^.]+)+", field):
        raise ValueError(
            f"{key} is {field!r}; expected a member such as txt, its lines (txt.lines), or a field of json: json.caption"
        )


def decode_text(data: bytes, what: str) -> str:
    """Decode UTF-8; `what` names the text in messages. Raises: BadSample for other bytes, or for NULs, as in UTF-16."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(
            f"{what} is not UTF-8 ({error.reason} at byte {error.start}); convert it", "caption_encoding"
        ) from error
    if "\0" in text:
        raise BadSample(f"{what} has NULs, as UTF-16 has; convert it to UTF-8", "caption_encoding")
    return text


def decode_captions(data: bytes, field: str) -> list[str]:
    """Return the captions of a sample: the text of a member, its lines, or a string or list of strings in `json`.

    Args:
        data: bytes of the member.
        field: name of a text member such as `txt`; `txt.lines` for one caption a line; or `json.<dotted path>`.

    Raises: BadSample if the member cannot be parsed or has no caption with a visible character.
    """
    if field.startswith("json."):
        value = read_json_field(data, field.removeprefix("json."))
    elif field.endswith(".lines"):
        value = decode_text(data, f"its {field.removesuffix('.lines')} member").splitlines()
    else:
        value = decode_text(data, f"its {field} member")
    captions = value if isinstance(value, list) else [value]
    longest = max((len(caption) for caption in captions if isinstance(caption, str)), default=0)
    if longest > MAX_CAPTION_CHARACTERS:
        raise BadSample(
            f"its caption has {longest} characters, more than the limit of {MAX_CAPTION_CHARACTERS}", "caption_length"
        )
    captions = [caption.strip() for caption in captions if isinstance(caption, str) and is_visible(caption)]
    if not captions:
        raise BadSample(f"its caption field {field!r} is empty (it has no visible character)", "caption_empty")
    return [_without_lone_surrogates(caption) for caption in captions]


def read_captions(source: SampleSource, sample_id: int, field: str) -> list[str]:
    """Return the captions in `field` (`txt`, `txt.lines` or `json.<path>`). Raises: BadSample if there are none."""
    return decode_captions(source.read(sample_id, (field.split(".")[0],)), field)
