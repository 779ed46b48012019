"""A small model, a batch, and one step of it, on whatever ranks call it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from timm.layers import DropBlock2d
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from mmpretrain import distributed, losses
from mmpretrain.batch import Batch, Samples
from mmpretrain.checkpoints import store
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Strategy
from mmpretrain.data.packing import packed, row_length
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.base import Objective
from mmpretrain.objectives.captioning import Captioning
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.objectives.classification import Classification
from mmpretrain.objectives.distillation import Distillation
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.objectives.mlm import MLM
from mmpretrain.objectives.prototypical import Prototypical
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.objectives.simclr import SimCLR
from mmpretrain.optim import adamw, grad_norms, guarded_step, optimizer_tensors, timm_optimizer
from mmpretrain.schedules import Clock, Duration, ScheduledValue, TrainingProgress
from mmpretrain.seeds import hash64, torch_draws
from mmpretrain.training import parallel, probe, randomness_watch, resume, traffic
from mmpretrain.training.diagnose import diagnose
from mmpretrain.training.ema import EMA
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Encodings, Task

BATCH_SIZE = 16
CONTEXT = 20
NUM_STEPS = 20
Result = tuple[dict[str, float], dict[str, Tensor]]


BIDIRECTIONAL = ("mlm", "mlm_words", "mlm_texts")


RANDOM = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "drop_path_rate": 0.2}
"""Arguments of timm's for an image encoder that draws in every way it can."""


def spread(
    strategy: str = "ddp",
    activation_checkpointing: str = "none",
    compile: bool = False,
    shard_degree: int | None = None,
) -> ParallelConfig:
    """How a task is spread over processes; what is not named is as conf/parallel/ddp.yaml has it."""
    kind = ActivationCheckpointing(activation_checkpointing)
    return ParallelConfig(Strategy(strategy), kind, compile, shard_degree=shard_degree)


def make_task(objectives: tuple[str, ...], text_dropout: float = 0.0, **image_args: Any) -> Task:
    """A tiny model in float64 with the objectives, the same on every rank."""
    torch.manual_seed(0)
    causal = not set(objectives) & set(BIDIRECTIONAL)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **image_args}
    image = TimmEncoder("vit_base_patch16_clip_224", 32, args)
    shape = {"vocab_size": 50, "context_length": CONTEXT, "width": 16, "depth": 2, "num_heads": 2}
    text = TextTransformer(**shape, causal=causal, dropout=text_dropout)  # type: ignore[arg-type]
    model = ImageTextModel(image, text, embed_dim=12)
    makers = {
        "infonce": lambda: InfoNCE(model),
        "sigmoid": lambda: Sigmoid(model),
        "multi_positive": lambda: InfoNCE(model, positives="group"),
        "mae": lambda: MAE(model, mask_ratio=(0.3, 0.8), decoder_width=16, decoder_depth=1, decoder_heads=2),
        "mae_fixed": lambda: MAE(model, mask_ratio=0.75, decoder_width=16, decoder_depth=1, decoder_heads=2),
    }
    makers |= {
        "mae_images": lambda: MAE(
            model, mask_ratio=(0.3, 0.8), decoder_width=16, decoder_depth=1, decoder_heads=2, stream="images"
        ),
        "flip": lambda: InfoNCE(model, mask_ratio=0.5),
        "flip_block": lambda: Sigmoid(model, mask_ratio=0.4, mask_kind="block"),
        "mlm": lambda: MLM(model, mask_ratio=0.3),
        "mlm_texts": lambda: MLM(model, mask_ratio=0.3, stream="texts"),
        "mlm_words": lambda: MLM(model, mask_ratio=0.3, whole_words=True),
        "causal_lm": lambda: CausalLM(model),
        "captioning": lambda: Captioning(model, decoder_depth=2, decoder_heads=2, num_queries=0),
        "coca": lambda: Captioning(model, decoder_depth=1, decoder_heads=2, num_queries=5),
        "cappa": lambda: Captioning(model, decoder_depth=2, decoder_heads=2, num_queries=0, parallel=0.5),
        "classification": lambda: Classification(model, num_classes=4, label_smoothing=0.1),
        "classification_text": lambda: Classification(model, num_classes=4, features="embedding", tower="text"),
        "prototypical": lambda: Prototypical(model, shots=2),
        "simclr": lambda: SimCLR(model, hidden_width=20, embed_dim=6),
        "simclr_layer": lambda: SimCLR(model, hidden_width=20, embed_dim=6, norm="layer"),
        "distillation": lambda: distillation(model),
    }
    parts: dict[str, Objective] = {name: makers[name]() for name in objectives}
    return Task(model, parts).double()


def distillation(model: ImageTextModel) -> Distillation:
    """Distillation to other weights than the model's, since there would be no gradient where it begins."""
    objective = Distillation(model)
    teacher = objective.teacher.state_dict()
    objective.teacher.load_state_dict(
        {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in teacher.items()}
    )
    return objective


def make_samples(rows: Tensor, batch_size: int = BATCH_SIZE) -> Samples:
    """Samples number `rows` of a fixed batch, packed as the loader does."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 50, (batch_size, CONTEXT), generator=generator)
    lengths = torch.randint(2, CONTEXT + 1, (batch_size,), generator=generator)
    views = torch.randint(0, 256, (batch_size, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.arange(batch_size)
    ids[5] = 11  # a copy of sample 11, as where a batch crosses an epoch's end
    images[5], text[5], lengths[5] = images[11], text[11], lengths[11]
    length = row_length(lengths[rows], CONTEXT)
    seeds = torch_draws(torch.tensor([hash64("ragged") >> 1]), batch_size)[0]
    text = text[rows, :length]
    return Samples(
        rows, ids[rows], seeds[rows], images[rows], text, lengths[rows], packed(lengths[rows], length),
        groups=ids[rows] % 5, views=views[rows], word_starts=text % 3 != 0,
        labels=ids[rows] % 4, mixed_labels=ids[rows] % 3, mixed_shares=(ids[rows] % 7) / 8,
    )  # fmt: skip


def make_batches(num_micro_batches: int, seed: int = 7, batch_size: int = BATCH_SIZE) -> list[Batch]:
    """This rank's micro-batches of the fixed batch."""

    def parts(num_samples: int) -> list[Samples]:
        rows = torch.arange(num_samples) % batch_size
        mine = rows.chunk(distributed.world_size())[distributed.rank()]
        return [make_samples(part, batch_size) for part in mine.chunk(num_micro_batches)]

    # Each stream has a batch size of its own.
    streams = {"pairs": parts(batch_size), "images": parts(2 * batch_size), "texts": parts(3 * batch_size)}
    return [Batch({name: samples[i] for name, samples in streams.items()}, seed) for i in range(num_micro_batches)]


def example_batch() -> Batch:
    """Two samples of each stream."""
    return Batch({name: make_samples(torch.arange(2)) for name in ("pairs", "images", "texts")})


def step(
    objectives: tuple[str, ...],
    num_micro_batches: int,
    weights: dict[str, float],
    random: bool = False,
    batch_size: int = BATCH_SIZE,
    options: ParallelConfig | None = None,
) -> Result:
    """One step's losses and gradients; on several ranks through DDP. `random`: with dropout and drop path."""
    task = make_task(objectives, 0.1, **RANDOM) if random else make_task(objectives)
    batches = make_batches(num_micro_batches, batch_size=batch_size)
    freeze = Freeze(task, {}, probe.reached_parameters(task, batches[0]))
    if not random:
        task.randomness = None
    if options is not None:
        parallel.prepare(task, torch.device("cpu"), "fp32", options)
    wrapped = parallel.wrap(task, torch.device("cpu"))
    losses = forward_backward(wrapped, task, batches, weights)
    reduced = {name: float(means["loss"]) for name, means in losses.reduced().items()}
    gradients = {name: distributed.full(p.grad).clone() for name, p in task.named_parameters() if p.grad is not None}
    assert set(freeze.unreached).isdisjoint(gradients)
    return reduced, gradients


def train(
    objectives: tuple[str, ...],
    options: ParallelConfig,
    num_micro_batches: int,
    num_steps: int,
    load: Path | None = None,
    save: Path | None = None,
    frozen_steps: int = 0,
    random: bool = False,
) -> list[dict[str, float]]:
    """The losses and gradient norms of a few steps of AdamW, and what evaluation and the average see after them.

    `load` is a checkpoint to go on from, `save` the folder for one at the end; the image tower is frozen for the first
    `frozen_steps`; `random`: with dropout and drop path.
    """
    task = make_task(objectives, 0.1, **RANDOM) if random else make_task(objectives)
    until: dict[str, Duration | None] = (
        {"image": Duration.parse(f"{frozen_steps}steps", "until")} if frozen_steps else {}
    )
    freeze = Freeze(task, until, probe.reached_parameters(task, make_batches(num_micro_batches)[0]))
    if not random:
        task.randomness = None
    whole = parallel.prepare(task, torch.device("cpu"), "fp32", options)
    if load is not None:
        resume.load_task(load, task)
    optimizer = adamw(task.named_parameters(), 1e-3, 0.1, (0.9, 0.98), 1e-6, {"text": {"lr": 2e-3}})
    assert set(freeze.unreached).isdisjoint(name for group in optimizer.param_groups for name in group["names"])
    average = EMA(task, ScheduledValue(0.5, "x"))
    first = 0
    if load is not None:
        first = resume.load(load, optimizer, average).step
    weights = dict.fromkeys(objectives, 1.0)
    wrapped = parallel.wrap(task, torch.device("cpu"))
    seen = []
    clock = Clock(BATCH_SIZE, BATCH_SIZE, NUM_STEPS * BATCH_SIZE)
    for i in range(first, first + num_steps):
        if freeze.apply(TrainingProgress(i * BATCH_SIZE, clock), weights):
            wrapped = parallel.wrap(task, torch.device("cpu"))
        losses = forward_backward(wrapped, task, make_batches(num_micro_batches, seed=i), weights)
        norms = grad_norms(optimizer)
        skipped = guarded_step(optimizer, norms["all"], 1.0)
        task.after_step(TrainingProgress(i * BATCH_SIZE, clock), skipped)
        average.update(TrainingProgress(i * BATCH_SIZE, clock), torch.zeros(()))
        values = {name: float(means["loss"]) for name, means in losses.reduced().items()}
        seen.append(values | {f"norm_{name}": float(norm) for name, norm in norms.items()})
    whole_task = whole()
    for _ in range(distributed.rank() + 1):  # by one process oftener than by the other
        ours = whole_task.model.embed_images(make_samples(torch.arange(BATCH_SIZE)).images).double()
    seen.append({"embedding": float((ours.square() * torch.arange(ours.shape[1])).sum())})
    seen.append({f"average/{name}": float(distributed.full(t).norm()) for name, t in average.tensors.items()})
    if save is not None:
        parts = {"model": task.state_dict(), "optimizer": optimizer_tensors(optimizer), "ema": average.tensors}
        step = first + num_steps
        state = {"step": step, "samples": step * BATCH_SIZE, "fingerprint": {}, "optimizer": {}}
        if parallel.is_sharded(options):
            store.save_sharded(save, step, parts, state, keep_last=0)
        elif distributed.is_main():
            store.save(save, step, parts, state, keep_last=0)
    return seen


def sent_bytes(options: ParallelConfig, num_micro_batches: int) -> tuple[dict[str, float], dict[str, float]]:
    """The bytes that a step of MAE sends by kind, as they are reported and as they are counted in one of that many."""
    task = make_task(("mae",))
    Freeze(task, {}, probe.reached_parameters(task, make_batches(1)[0]))
    parallel.prepare(task, torch.device("cpu"), "fp32", options)
    wrapped = parallel.wrap(task, torch.device("cpu"))

    def step(number: int) -> None:
        forward_backward(wrapped, task, make_batches(1) * number, {"mae": 1.0})

    reported = traffic.of_step(step, num_micro_batches)
    with traffic.Collectives() as collectives:
        step(num_micro_batches)
    return reported, traffic.sent_bytes(collectives.seen)


def num_reductions(strategy: str, num_micro_batches: int) -> int:
    """How often gradients are reduced over the ranks in a step."""
    task = make_task(("mae",))
    parallel.prepare(task, torch.device("cpu"), "fp32", spread(strategy))
    wrapped = parallel.wrap(task, torch.device("cpu"))
    with CommDebugMode() as collectives:
        forward_backward(wrapped, task, make_batches(num_micro_batches), {"mae": 1.0})
    counts = {str(kind): count for kind, count in collectives.get_comm_counts().items()}
    return sum(count for kind, count in counts.items() if "reduce_scatter" in kind)


def held(options: ParallelConfig) -> tuple[int, int, int]:
    """Numbers of weights and gradients that this process holds, and of weights of the whole task."""
    task = make_task(("infonce",))
    whole = parallel.prepare(task, torch.device("cpu"), "fp32", options)
    forward_backward(task, task, make_batches(1), {"infonce": 1.0})
    parameters = [p for p in task.parameters() if isinstance(p, DTensor)]
    own = sum(p.to_local().numel() for p in parameters), sum(p.grad.to_local().numel() for p in parameters)  # type: ignore[union-attr]
    return *own, sum(p.numel() for p in whole().parameters() if not isinstance(p, DTensor))


def bf16_losses(options: ParallelConfig) -> list[float]:
    """The losses of three steps in bf16."""
    task = make_task(("infonce", "mae")).float()
    Freeze(task, {}, probe.reached_parameters(task, make_batches(1)[0]))
    parallel.prepare(task, torch.device("cpu"), "bf16", options)
    optimizer = adamw(task.named_parameters(), 1e-3, 0.1, (0.9, 0.98), 1e-6, {})
    wrapped = parallel.wrap(task, torch.device("cpu"))
    losses = []
    for i in range(3):
        passes = torch.autocast("cpu", torch.bfloat16)
        found = forward_backward(wrapped, task, make_batches(1, seed=i), {"infonce": 1.0, "mae": 1.0}, passes)
        guarded_step(optimizer, grad_norms(optimizer)["all"], None)
        losses += [float(means["loss"]) for means in found.reduced().values()]
    return losses


class Noise(nn.Module):
    """Adds noise that a generator gives, whoever it is for."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randperm(x.shape[-1], device=x.device) / x.shape[-1]


class NumpyNoise(nn.Module):
    """Adds noise from NumPy's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())  # noqa: NPY002, what is tested


class OwnNoise(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seed += 1
        return x + torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(self.seed), dtype=x.dtype)


class SharedDropBlock(nn.Module):
    """Blocks that are dropped by sample, in numbers that are evened out over the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = DropBlock2d(0.4, block_size=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)


class BesideBatchNorm(SharedDropBlock):
    """The same in a model with BatchNorm, which looks at neighbours, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


class OfTokens(nn.Module):
    """Drops of tokens whose samples it has lost sight of."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.flatten(0, 1)[1:], 0.5, self.training).sum() + x


def task_with(layer: nn.Module) -> Task:
    task = make_task(("infonce", "mae"), 0.1, init_values=1e-4)  # layer scale, which hides the layer at first
    task.model.image.trunk.blocks[0].mlp.add_module("drop2", layer.double())  # type: ignore[attr-defined]
    return task


def refused_randomness(layer: type[nn.Module]) -> str:
    """What is said on several processes of a layer that does not draw by sample."""
    try:
        randomness_watch.settle_randomness(task_with(layer()), example_batch(), 1)
    except ValueError as error:
        return str(error)
    return "nothing"


def refused_degree(strategy: str, degree: int) -> str:
    """What is said of a number of processes that share the weights."""
    try:
        parallel.num_shards(spread(strategy, shard_degree=degree))
    except ValueError as error:
        return str(error)
    return "nothing"


def refused_strategy() -> str:
    """What is said where there are several processes and no strategy."""
    try:
        parallel.prepare(make_task(("infonce",)), torch.device("cpu"), "fp32", spread("none"))
    except ValueError as error:
        return str(error)
    return "nothing"


def refused_optimizer(name: str) -> str:
    """What is said of an optimiser of timm where weights are sharded."""
    task = make_task(("infonce",)).float()
    Freeze(task, {}, probe.reached_parameters(task, make_batches(1)[0]))
    parallel.prepare(task, torch.device("cpu"), "fp32", spread("fsdp"))
    try:
        parallel.check_optimizer(timm_optimizer(task.named_parameters(), name, 1e-2, 0.1, {}))
    except ValueError as error:
        return str(error)
    return "nothing"


DIAGNOSED = {"infonce": 1.0, "mae": 0.5, "mlm": 2.0}


def diagnosed(num_micro_batches: int) -> dict[str, float]:
    """The diagnosis of the fixed batch."""
    task = make_task(tuple(DIAGNOSED))
    return diagnose(task, make_batches(num_micro_batches), DIAGNOSED, torch.autocast("cpu", enabled=False), None)


def open_clip_step(kind: str) -> Result:
    """The same batch through open_clip's loss; copies of a sample would be negatives there, so there are none here."""
    task = make_task((kind,))
    batches = [_without_copies(batch) for batch in make_batches(1)]
    encodings = Encodings(task.model, batches[0])
    objective = task.objectives[kind]
    image, text = encodings.image_embedding("pairs"), encodings.text_embedding("pairs")
    rank, world = distributed.rank(), distributed.world_size()
    if isinstance(objective, InfoNCE):
        clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        loss = clip(image, text, objective.logit_scale.exp())
    else:
        assert isinstance(objective, Sigmoid)
        siglip = SigLipLoss(rank=rank, world_size=world)
        loss = siglip(image, text, objective.logit_scale.exp(), objective.logit_bias)
    loss.backward()
    # What DDP would do: the mean over ranks.
    gradients = {
        name: distributed.all_reduce_sum(p.grad) / world for name, p in task.named_parameters() if p.grad is not None
    }
    return {kind: float(distributed.all_reduce_sum(loss.detach()) / world)}, gradients


def our_step(kind: str) -> Result:
    task = make_task((kind,))
    losses = forward_backward(task, task, [_without_copies(batch) for batch in make_batches(1)], {kind: 1.0})
    gradients = {
        name: distributed.all_reduce_sum(p.grad) / distributed.world_size()
        for name, p in task.named_parameters()
        if p.grad is not None
    }
    return {name: float(means["loss"]) for name, means in losses.reduced().items()}, gradients


def _without_copies(batch: Batch) -> Batch:
    samples = batch.streams["pairs"]
    return replace(batch, streams={"pairs": replace(samples, ids=samples.positions)})


def late_flags() -> list[dict[str, float]]:
    flags = distributed.LateFlags()
    seen = [flags.read()]
    for step_number in range(3):
        mine = float(distributed.rank() == 1 and step_number == 1)
        flags.post({"stop": torch.tensor(mine), "step": torch.tensor(float(step_number))})
        seen.append(flags.read())
    return seen


def refused_on_main() -> str:
    """What each rank is told when process 0 alone meets the error."""

    def look() -> int:
        assert distributed.is_main()
        raise ValueError("none of the checkpoints verifies")

    try:
        distributed.from_main(look)
    except ValueError as error:
        return str(error)
    return "nothing"


def told_by_main() -> int:
    return distributed.from_main(lambda: 10 + distributed.rank())


def ragged(rows_each: int) -> Tensor:
    """Rows of two numbers, `rows_each` times the rank's number of them: rank 0 has none."""
    rank = distributed.rank()
    rows = torch.full((rank * rows_each, 2), float(rank))
    return distributed.gather_ragged_rows(rows)


def split_nt_xent(num_rows: int) -> list[Tensor]:
    """SimCLR's split loss of the same rows on every rank, and its gradients, complete on every rank."""
    generator = torch.Generator().manual_seed(3)
    views = [F.normalize(torch.randn(num_rows, 6, dtype=torch.float64, generator=generator), dim=-1) for _ in range(2)]
    views = [view.requires_grad_() for view in views]
    loss = losses.nt_xent(*views, 0.1, torch.arange(num_rows) % 4, chunk_bytes=100, split=True)
    return [loss.detach(), *torch.autograd.grad(loss, views)]


def rows_of_the_head() -> list[int]:
    """The numbers of rows that the layers of SimCLR's head see on this rank in a step of two micro-batches."""
    task, seen = make_task(("simclr",)), []
    first = task.objectives["simclr"].head[0]  # type: ignore[attr-defined]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    forward_backward(parallel.wrap(task, torch.device("cpu")), task, make_batches(2), {"simclr": 1.0})
    return seen


def split_losses(num_rows: int) -> list[list[Tensor]]:
    """Each split loss of the same rows on every rank, and its gradients; those of the images are summed over ranks."""
    generator = torch.Generator().manual_seed(3)
    rows = [F.normalize(torch.randn(num_rows, 6, dtype=torch.float64, generator=generator), dim=-1) for _ in range(2)]
    ids = torch.arange(num_rows) % 4
    found = []
    for loss_of in (
        lambda x, y, s, b: losses.info_nce(x, y, s, ids, 100, split=True) + 0 * b,
        lambda x, y, s, b: losses.multi_positive_info_nce(x, y, s, ids, 100, split=True) + 0 * b,
        lambda x, y, s, b: losses.sigmoid_loss(x, y, s, b, ids, 100, split=True),
    ):
        scalars = [torch.tensor([value], dtype=torch.float64) for value in (13.0, -3.0)]
        inputs = [tensor.clone().requires_grad_() for tensor in rows + scalars]
        loss = loss_of(*inputs).sum()
        gradients = list(torch.autograd.grad(loss, inputs))
        distributed.all_reduce_sum(gradients[0])
        found.append([loss.detach(), *gradients])
    return found
