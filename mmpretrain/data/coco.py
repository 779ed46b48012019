"""Table of a COCO captions file: one row for each image, with the list of its captions."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmpretrain.data.pairs import Table, check_fits_memory

_EXPECTED = "expected a captions file of COCO, with `images` (id, file_name) and `annotations` (image_id, caption)"


def read_coco(path: Path, option: str = "--coco") -> Table:
    """Read the captions of COCO's `captions_*.json`: columns `key` (the image's id), `image` and `caption`, a list.

    Captions of an image that `images` does not list are refused, in one row behind those of the images.

    Args:
        path: path of the file.
        option: name of the option that holds the path, for messages.

    Raises: ValueError if the file is not such a file, or holds no image.
    """
    where = f"{option} {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{where}: no such file; {_EXPECTED}")
    check_fits_memory(path)
    try:
        coco = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {_EXPECTED}") from error
    images, annotations = (_objects(coco, name, where) for name in ("images", "annotations"))
    captions = defaultdict(list)
    for annotation in annotations:
        if "caption" not in annotation:
            raise ValueError(f"{where}: an annotation without a caption; {_EXPECTED}")
        captions[str(annotation.get("image_id"))].append(annotation["caption"])
    table = Table(["key", "image", "caption"], path.parent)
    for number, image in enumerate(images, start=1):
        key = str(image.get("id"))
        table.add(number, {"key": key, "image": image.get("file_name"), "caption": _texts(captions[key])})
    unknown = captions.keys() - {str(image.get("id")) for image in images}
    for number, key in enumerate(sorted(unknown), start=len(images) + 1):
        table.add(number, f"{len(captions[key])} captions of image {key}, which `images` does not list")
    return table


def _objects(coco: Any, name: str, where: str) -> list[dict[str, Any]]:
    found = coco.get(name) if isinstance(coco, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{where}: no list of `{name}` in it; {_EXPECTED}")
    return found


def _texts(captions: list[Any]) -> list[str]:
    """Return the captions that are texts, without the line ends and blanks that some of COCO's have around them."""
    return [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
