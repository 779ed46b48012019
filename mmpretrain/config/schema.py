"""Schema of the configuration: keys and types of each command.

The schema comes first in the defaults lists, so that a misspelt key is an error in an experiment's YAML and on the
command line. Arguments of a `_target_` are checked against the callable's signature (instantiate.py).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mmpretrain.data.open_shards import StorageOptions
from mmpretrain.data.shorten import Shorten
from mmpretrain.data.stream import Shuffle

Scheduled = Any
"""A number, or a schedule of it as a mapping (see `mmpretrain.schedules`). OmegaConf's types cannot express it."""


class Precision(str, Enum):
    """Arithmetic of the forward and backward passes. Losses and parameters are always float32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass
class RunConfig:
    """Name, directory and seed of a run."""

    name: str | None = None
    """Name of the run; null: made of the overrides that touch the mathematics or the data."""
    dir: str | None = None
    """Folder of the run; null: runs/<experiment>/<name>."""
    sync_to: str | None = None
    """Address or folder to which checkpoints, curves and logs are copied while the run goes on, such as s3://bucket/run; a
    run without a local checkpoint, or behind its copy, goes on from there. Null: none."""
    seed: int = 0


class SpikeAction(str, Enum):
    """What a loss spike leads to: nothing, a skipped step, or the last checkpoint and other samples."""

    none = "none"
    skip = "skip"
    rollback = "rollback"


@dataclass
class SpikeConfig:
    """Loss spikes: what is one, and what it leads to; conf/train.yaml has the defaults."""

    action: SpikeAction = MISSING
    threshold: float = MISSING
    window: int = MISSING


@dataclass
class LoraConfig:
    """Low-rank adapters of the encoders' linear layers; conf/train.yaml has the defaults."""

    rank: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    targets: list[str] = MISSING


@dataclass
class TrainerConfig:
    """Settings of the training loop; conf/train.yaml has the defaults."""

    duration: str = MISSING
    batch_size: int = MISSING
    micro_batch_size: int | None = MISSING
    precision: Precision = MISSING
    clip_grad_norm: float | None = MISSING
    ema_decay: Scheduled = MISSING
    freeze: Any = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    log_every: str = MISSING
    diagnose_every: str | None = MISSING
    eval_every: str = MISSING
    max_bad_steps: int = MISSING
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    device: str = MISSING
    dry_run: bool = MISSING
    profile_steps: int = MISSING
    detect_anomaly: bool = MISSING


class Strategy(str, Enum):
    """Strategy of distributed training."""

    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"
    none = "none"


class ActivationCheckpointing(str, Enum):
    """Parts of the model that are recomputed in the backward pass instead of being saved."""

    none = "none"
    blocks = "blocks"
    selective = "selective"


@dataclass
class ParallelConfig:
    """Distribution, activation checkpointing and compilation of the model; conf/parallel has the defaults."""

    strategy: Strategy = MISSING
    activation_checkpointing: ActivationCheckpointing = MISSING
    compile: bool = MISSING
    timeout_seconds: float = MISSING
    shard_degree: int | None = None
    """Number of processes that share a copy of the weights with parallel=hsdp; null: those of one machine."""


@dataclass
class CheckpointConfig:
    """Interval and number of checkpoints, and the metric of the best one."""

    every: str = MISSING
    keep_last: int = MISSING
    best: str | None = MISSING


@dataclass
class SourceConfig:
    """One source of a stream, with a sampling weight: either `shards` or `source`."""

    shards: Any = None
    """Tars: a file, a folder, a glob or brace pattern, or a list of them."""
    source: dict[str, Any] | None = None
    """Samples that are stored otherwise, instead of `shards`; see `data.train.<stream>.source`."""
    subset: str | None = None
    """A .npy of keys, or of uids as DataComp publishes them, of the samples to train on; null: all."""
    weight: float | None = None
    """Share of the stream's samples, relative to the other sources; null for all of them: sources are joined."""


@dataclass
class LabelConfig:
    """Labels of a data set, and the list of its classes."""

    label: str | None = None
    """Member that holds the label: cls (an integer) or json.<field> (an integer or a class's name); null: no labels."""
    classes: str | None = None
    """Class list, in the order of the labels: a TSV with a header, or one name a line, relative to data.root; or clip:NAME,
    the classes of a data set of CLIP's paper, such as clip:cifar10."""
    class_column: str = "label"
    """Column of the class list that holds the names."""
    text_column: str | None = None
    """Column of the class list that holds a text for each class, used as it is; null: templates."""
    templates: Any = "openai"
    """Prompts for class names: `openai` or `simple` (open_clip's sets), clip:NAME, such as clip:cifar10, or a list of
    sentences with {} for the name."""


@dataclass
class EpisodesConfig:
    """Batches with the same number of samples of each of a few classes, for objective=prototypical."""

    ways: int = 0
    """Number of classes of a batch; 0: batches of any classes. It needs `label`, and a batch of ways x per_class."""
    per_class: int = 8
    """Number of samples of each class."""


@dataclass
class StreamConfig(LabelConfig):
    """One stream of training samples."""

    shards: Any = None
    source: dict[str, Any] | None = None
    """Samples that are stored otherwise, instead of `shards`: a `_target_` that makes a `SampleSource`, with its arguments,
    such as mmpretrain.data.parquet.ParquetSource. Its `path` may change when a run is resumed, if the data are the same."""
    subset: str | None = None
    max_samples: int | None = None
    shots: int | None = None
    """Number of samples of each class to train on, drawn by run.seed; null: all. It needs `label`."""
    repeat_batches: int | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sets of samples by name, each with a share of its own, instead of `shards` or `source`."""
    shuffle: Shuffle = Shuffle.blocks
    """Order of the samples: blocks of 256 samples, 64 of them mixed at a time; or whole shards, two or more of them mixed
    at a time, which remote shards without indexes need."""
    batch_size: Any = None
    image_size: Any = None
    text_length: Any = None
    shorten: Shorten = Shorten.truncate
    caption: Any = None
    group: str | None = None
    transform: dict[str, Any] | None = None
    synthetic: dict[str, Any] | None = None
    """Noise instead of tars: {num_samples: an epoch, text_length: [smallest, largest]}; data=synthetic. Null: tars."""
    augment: list[Any] = field(default_factory=list)
    views: list[Any] = field(default_factory=list)
    """Further views of each image, each {transform: ..., augment: [...]}; see conf/objective/simclr.yaml."""
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    mix: dict[str, Any] | None = None
    """Mixup and CutMix of images and their classes: augmentation=mixup; null: none. It needs `label`."""


@dataclass
class SplitConfig:
    """Samples that an evaluator learns from: either `shards` or `source`."""

    shards: Any = None
    """Tars of the training split, with the same fields, for linear_probe, knn, few_shot, text_classification and memorised;
    null: these do not apply."""
    source: dict[str, Any] | None = None
    """Samples of the training split that are stored otherwise, instead of `shards`."""


@dataclass
class EvalSetConfig(LabelConfig):
    """One held-out data set: `shards`, `source` or `wds`."""

    shards: Any = None
    """Tars: a file, a folder, a glob or brace pattern, or a list of them."""
    source: dict[str, Any] | None = None
    """Samples that are stored otherwise, instead of `shards`; see `data.train.<stream>.source`."""
    wds: str | None = None
    """Folder in CLIP_benchmark's WebDataset layout, relative to data.root, with `test/*.tar`, `classnames.txt` and the like.
    It gives shards, caption or label, classes, templates and train; `templates` counts where it has none."""
    caption: str | None = None
    """Member that holds the captions: txt, txt.lines (one a line) or json.<field>; null: no retrieval."""
    images: bool = True
    """false: the samples have no images; only evaluators of texts apply."""
    fields: dict[str, str] = field(default_factory=dict)
    """Further fields of json that evaluators ask for, by the name that they use, such as {group: json.country}."""
    train: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class DataConfig(StorageOptions):
    """Data sets, tokenizer and loading."""

    root: str = MISSING
    workers: Any = MISSING
    max_bad_fraction: float = MISSING
    max_image_bytes: int = MISSING
    tokenizer: dict[str, Any] = MISSING
    train: dict[str, StreamConfig] = field(default_factory=dict)
    val: dict[str, EvalSetConfig] = field(default_factory=dict)
    val_batch_size: int = MISSING
    timeout_seconds: float = MISSING


@dataclass
class TrainConfig:
    """Configuration of `python -m mmpretrain.train`."""

    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = MISSING
    """The model; see the list of models."""
    objective: dict[str, Any] = field(default_factory=dict)
    """The objectives by name; see the list of objectives."""
    optimizer: dict[str, Any] = MISSING
    """The optimizer; see the list of optimizers."""
    schedule: dict[str, Any] = MISSING
    """The learning rate's schedule; see the list of schedules."""
    eval: dict[str, Any] = field(default_factory=dict)
    """The evaluators by name; see the list of evaluators."""
    writer: dict[str, Any] = field(default_factory=dict)
    """The metric writers by name, besides metrics.jsonl; see the list of metric writers."""
    init_from: str | None = None
    if_present: dict[str, Any] = field(default_factory=dict)
    """Values for parts that an experiment may lack: they apply where the part is there; used by size and debug presets."""
    # Not a configuration key: unresolved text of the values that come from the environment, by their path of keys.
    from_environment: dict[tuple[str | int, ...], str] = field(
        default_factory=dict, metadata={"omegaconf_ignore": True}
    )


@dataclass
class EvalDataConfig(StorageOptions):
    """Data sets of an evaluation. The run's own settings replace those that are omitted."""

    root: str | None = None
    workers: int = MISSING
    val: dict[str, EvalSetConfig] = field(default_factory=dict)
    suite: str | None = None
    val_batch_size: int | None = MISSING


@dataclass
class EvaluateConfig:
    """Configuration of `python -m mmpretrain.evaluate`."""

    checkpoint: str = MISSING
    output: str | None = None
    cache: str = MISSING
    trust: list[str] = field(default_factory=list)
    ema: bool = MISSING
    device: str = MISSING
    precision: Precision | None = MISSING
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    eval: dict[str, Any] = field(default_factory=dict)
    """The evaluators by name; see the list of evaluators."""


@dataclass
class ExportConfig:
    """Configuration of `python -m mmpretrain.export`."""

    checkpoint: str = MISSING
    format: str = MISSING
    output: str = MISSING
    ema: bool = MISSING
    trust: list[str] = field(default_factory=list)


@dataclass
class InterpolateConfig:
    """Configuration of `python -m mmpretrain.interpolate`."""

    checkpoints: list[str] = MISSING
    alpha: Any = None
    output: str = MISSING
    ema: bool = MISSING


@dataclass
class EmbedConfig:
    """Configuration of `python -m mmpretrain.embed`."""

    checkpoint: str = MISSING
    images: Any = None
    texts: str | None = None
    output: str = MISSING
    batch_size: int = MISSING
    workers: int = MISSING
    device: str = MISSING
    precision: Precision | None = MISSING
    ema: bool = MISSING
    storage: StorageOptions = field(default_factory=StorageOptions)
    """Where tars of `images` have their indexes, and the cache of remote ones."""
    trust: list[str] = field(default_factory=list)


@dataclass
class DemoConfig:
    """Configuration of `python -m mmpretrain.demo`."""

    checkpoint: str = MISSING
    images: Any = None
    host: str = MISSING
    port: int = MISSING
    cache: str = MISSING
    batch_size: int = MISSING
    workers: int = MISSING
    device: str = MISSING
    precision: Precision | None = MISSING
    ema: bool = MISSING
    storage: StorageOptions = field(default_factory=StorageOptions)
    """Where tars of `images` have their indexes, and the cache of remote ones."""
    trust: list[str] = field(default_factory=list)


def register_schemas() -> None:
    """Register the schemas with Hydra under the names that the defaults lists use."""
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("evaluate_schema", EvaluateConfig)
    store.store("export_schema", ExportConfig)
    store.store("embed_schema", EmbedConfig)
    store.store("interpolate_schema", InterpolateConfig)
    store.store("demo_schema", DemoConfig)
