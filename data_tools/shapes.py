"""Command `shapes`: build the embedded data set of drawn scenes, with compositional captions and held-out pairs."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.drawing import draw_scene
from data_tools.output import CLASSES as CLASS_LIST
from data_tools.output import close_output, locked_output, open_output, write_atomically
from data_tools.pool import run_tasks
from data_tools.scenes import CLASSES, HELD_OUT, TRAINED, Scene, make_scene
from data_tools.shard_writer import WrittenShard, finish_shard
from mmpretrain.seeds import hash64, permutation

SAMPLES_PER_SHARD = 1008
JPEG_QUALITY = 95
DRAWING_VERSION = 1  # part of the plan, which decides if a killed build's shards are kept


@dataclass(frozen=True)
class ShapesOptions:
    """Number of samples per split, image side in pixels, and seed.

    Classes are exactly balanced if their number divides the number of samples.
    """

    train: int = 8064
    val: int = 1008
    composition: int = 448
    image_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class _Task:
    """Task for one shard: samples `low` to `high` - 1 of a split of `num_samples`."""

    path: Path
    split: str
    num_samples: int
    low: int
    high: int
    image_size: int
    seed: int


def build_shapes(output: Path, options: ShapesOptions, workers: int) -> dict[str, list[WrittenShard]]:
    """Build `train`, `val`, `composition` and a `classes.tsv` of all pairs of colour and shape in `output`.

    The main pairs of `composition` occur nowhere else, neither as main nor as second object.

    Raises: ValueError if a file that no build wrote would be overwritten, or if another build is writing.
    """
    sizes = {"train": options.train, "val": options.val, "composition": options.composition}
    lines = [f"{i}\t{' '.join(pair)}\t{int(pair in HELD_OUT)}\n" for i, pair in enumerate(CLASSES)]
    class_list = "index\tlabel\theld_out\n" + "".join(lines)
    path = output / CLASS_LIST
    if path.exists() and path.read_text(errors="replace") != class_list:
        raise ValueError(f"--output {str(output)!r}: holds {CLASS_LIST}, which no build wrote; name another folder")
    with ExitStack() as locks:
        for split in sizes:
            locks.enter_context(locked_output(output / split))
        write_atomically(path, class_list)
        return _build_splits(output, sizes, options, workers)


def _build_splits(
    output: Path, sizes: Mapping[str, int], options: ShapesOptions, workers: int
) -> dict[str, list[WrittenShard]]:
    """Build the splits in locked folders; `sizes` holds the number of samples of each."""
    tasks = []
    for split, num_samples in sizes.items():
        plan = json.dumps([DRAWING_VERSION, split, num_samples, options.image_size, options.seed])
        digest = hashlib.sha256(plan.encode()).hexdigest()
        for path, low, high in open_output(output / split, digest, num_samples, SAMPLES_PER_SHARD):
            tasks.append(_Task(path, split, num_samples, low, high, options.image_size, options.seed))

    shards: dict[str, list[WrittenShard]] = {split: [] for split in sizes}
    for task, written in zip(tasks, list(run_tasks(_finish_shard, tasks, workers, "drawing shapes"))):
        shards[task.split].append(written)
    for split in sizes:
        close_output(output / split, shards[split], {"num_classes": len(CLASSES), "options": asdict(options)})
    return shards


def _finish_shard(task: _Task) -> WrittenShard:
    return finish_shard(task.path, _members(task), task.high - task.low)


def _members(task: _Task) -> Iterator[dict[str, str | bytes]]:
    pairs = [pair for pair in CLASSES if pair in HELD_OUT] if task.split == "composition" else TRAINED
    order = permutation(hash64("shapes", task.seed, task.split), task.num_samples)
    for number in range(task.low, task.high):
        pair = pairs[int(order[number]) % len(pairs)]
        scene = make_scene(hash64("shapes", task.seed, task.split, number), pair)
        buffer = io.BytesIO()
        # Full colour resolution: with subsampling, a small second object would get the colour of its surroundings.
        picture = draw_scene(scene.objects, scene.background, task.image_size)
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        yield {
            "__key__": f"{number:06d}",
            "jpg": buffer.getvalue(),
            "txt": scene.caption.encode(),
            "json": json.dumps(_attributes(scene)).encode(),
            "cls": str(CLASSES.index(pair)).encode(),
        }


def _attributes(scene: Scene) -> dict[str, object]:
    main = scene.objects[0]
    return {
        "caption": scene.caption,
        "label": f"{scene.color} {scene.shape}",
        "color": scene.color,
        "shape": scene.shape,
        "size": scene.size,
        "position": scene.position,
        "relation": scene.relation,
        "second_label": " ".join(scene.second) if scene.second else None,
        "second_color": scene.second[0] if scene.second else None,
        "second_shape": scene.second[1] if scene.second else None,
        "center": [round(main.x, 4), round(main.y, 4)],
        "radius": round(main.radius, 4),
        "rotation_degrees": round(main.rotation, 1),
        "second_center": [round(scene.objects[1].x, 4), round(scene.objects[1].y, 4)] if scene.second else None,
        "second_radius": round(scene.objects[1].radius, 4) if scene.second else None,
        "background": list(scene.background),
    }
