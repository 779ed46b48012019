"""Samples that are rows of a table of Arrow types: the columns of their fields, shared by Parquet and `datasets`."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mmpretrain.data.decode import BadSample
from mmpretrain.data.source import check_field_size
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS

_UNREADABLE = (pa.ArrowException, ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)


class Columns:
    """Columns of a table that hold the fields of a sample (see `SampleSource`).

    - `jpg`, `png` and the other image extensions: the column `image`, encoded bytes or a struct with them (`{bytes, path}`
      in Hugging Face's format);
    - `txt`: the column `caption`, one text;
    - `cls`: the column `label`, an integer;
    - `json`: all columns but images and other bytes, under their names: `json.<column>`. This is the field for a
      column with a list of captions and for a label that is a name;
    - any other name: the column of that name.

    Args:
        image, caption, label, key: names of the columns; None if there is none. `key` names samples.

    """

    def __init__(self, image: str | None, caption: str | None, label: str | None, key: str | None) -> None:
        self.image, self.key = image, key
        self._named = {"image": image, "caption": caption, "label": label, "key": key}
        self._columns = {"txt": caption, "cls": label, **dict.fromkeys(IMAGE_EXTENSIONS, image)}

    def check(self, schema: pa.Schema, where: str) -> None:
        """Check the columns of a file. Raises: ValueError for a column that is missing or has an unsuitable type."""
        for argument, column in self._named.items():
            if column is not None and column not in schema.names:
                raise ValueError(
                    f"{argument} is {column!r}; expected a column of {where}, which has {', '.join(schema.names)}"
                    + ("" if argument == "key" else f", or null for samples without: {argument}=...")
                )
        if self.image is not None and not has_bytes(kind := schema.field(self.image).type):
            raise ValueError(
                f"image is {self.image!r}, a column of {kind} in {where}; expected the bytes of images, or {{bytes, path}}; "
                "for paths of images, make tars with `python -m data_tools build`"
            )

    def of(self, field: str, schema: pa.Schema) -> list[str]:
        """Return the columns of a field; none if the table does not have it."""
        if field == "json":
            return [name for name in schema.names if name != self.image and not has_bytes(schema.field(name).type)]
        column = self._columns.get(field, field)
        return [] if column is None or column not in schema.names else [column]

    def encode(self, field: str, values: dict[str, pa.Scalar]) -> bytes:
        """Return a field's bytes from the values of its columns. Raises: BadSample for null and other unusable values."""
        if field == "json":
            return _json(values)
        ((column, value),) = values.items()
        data = _bytes(value, column)
        check_field_size(field, len(data))
        return data


def missing(fields: Sequence[str], schema: pa.Schema) -> BadSample:
    """Return the error of a sample that has none of the fields."""
    wanted = "image column" if fields[0] in IMAGE_EXTENSIONS else f"field {' or '.join(fields)}"
    return BadSample(f"it has no {wanted} (its columns are {', '.join(schema.names)})", "column")


def has_bytes(kind: pa.DataType) -> bool:
    """Return True for a column of bytes, or of a struct whose field `bytes` holds them."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and has_bytes(kind.field("bytes").type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _bytes(value: pa.Scalar, column: str) -> bytes:
    if isinstance(value, pa.StructScalar) and has_bytes(value.type):
        if value.is_valid and not value["bytes"].is_valid and "path" in value and value["path"].is_valid:
            raise BadSample(f"its column {column!r} holds a path ({value['path'].as_py()!r}) and no bytes", "column")
        value = value["bytes"] if value.is_valid else value
    if isinstance(value, pa.DictionaryScalar) and value.is_valid:
        value = value.dictionary[value.index.as_py()]
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if not value.is_valid:
        raise BadSample(f"its column {column!r} is null", "column")
    if isinstance(value, pa.BinaryScalar):  # strings, too
        data: bytes = value.as_buffer().to_pybytes()
        return data
    if isinstance(value, pa.ListScalar):
        raise BadSample(
            f"its column {column!r} holds a list; name it as json.{column}, where a list is several texts", "column"
        )
    if pa.types.is_nested(value.type):
        raise BadSample(
            f"its column {column!r} holds {value.type}; name a value in it as json.{column}.<name>", "column"
        )
    plain = value.as_py()
    return str(int(plain) if isinstance(plain, bool) else plain).encode()


def _json(values: dict[str, pa.Scalar]) -> bytes:
    row: dict[str, Any] = {}
    for column, value in values.items():
        try:
            row[column] = _python_value(value)
        except _UNREADABLE as error:
            raise BadSample(f"its column {column!r} cannot be read ({str(error).splitlines()[0]})", "column") from error
    data = json.dumps(row, default=_plain).encode()
    check_field_size("json", len(data))
    return data


def _python_value(value: pa.Scalar) -> Any:
    """Convert a value to a Python object, or to text if it does not fit one, such as times in ns."""
    try:
        return value.as_py()
    except _UNREADABLE:
        return value.cast(pa.string()).as_py()


def _plain(value: Any) -> Any:
    """Return a value that JSON can represent."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
