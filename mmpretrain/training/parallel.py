"""Activation checkpointing, compilation and distribution of the task, applied in this order, by DDP or FSDP2."""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmpretrain import distributed, optim
from mmpretrain.batch import Batch
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Precision, Strategy
from mmpretrain.training.diagnose import unchanged_buffers
from mmpretrain.training.randomness import RandomnessWatch, SampleRandomness, checkpoint_contexts
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)

_ROUNDING = 0.02  # relative error of a step: some optimisers compute in bf16
_SPLIT = 1e-4  # relative rounding error of a float32 loss when a micro-batch is split
_SPLIT_GRADIENT, _NEGLIGIBLE = 1e-2, 1e-6  # relative to a parameter's gradient norm; to the whole gradient's norm
_NAMED_LAYERS = 8

# Later releases of torch renamed the parameter.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def reached_parameters(task: Task, example: Batch) -> dict[str, frozenset[str]]:
    """Return the names of the parameters that each objective's gradient reaches.

    They are determined by a backward pass of each objective on a small example. Without this, the optimiser would apply
    weight decay to an unused tower or pooling head, and DDP would wait for their gradients.

    Args:
        task: the model and its objectives; its gradients are cleared.
        example: small batch of each stream.
    """
    task.eval()
    reached = {}
    for objective in task.objectives:
        forward_backward(task, task, [example], {name: float(name == objective) for name in task.objectives})
        reached[objective] = frozenset(
            name for name, parameter in task.named_parameters() if parameter.grad is not None
        )
        task.zero_grad()
    task.train()
    return reached


def settle_randomness(task: Task, example: Batch, num_micro_batches: int) -> None:
    """Detect random layers of the task, and set `task.randomness` so that they draw from the samples' seeds. A collective.

    Random numbers that a layer does not draw by sample depend on the number of processes and micro-batches. A step on a
    small example in training mode detects such layers.

    Args:
        task: task whose `randomness` is set; None if no layer draws random numbers.
        example: two samples of each stream.
        num_micro_batches: number of micro-batches of a step on one process.

    Raises: ValueError that names layers that do not draw by sample, if there are several processes or micro-batches.
        Otherwise such layers are named in a warning.
    """
    weights = dict.fromkeys(task.objectives, 1.0)
    watch = RandomnessWatch(task)
    task.randomness = lambda: watch
    with unchanged_buffers(task):
        forward_backward(task, task, [example], weights)
        task.zero_grad()
        strangers = list(watch.otherwise)
        if not (watch.by_sample or strangers):
            task.randomness = None
        elif not strangers:
            task.randomness = partial(SampleRandomness, strict=False)
            if _depends_on_neighbours(task, example, weights):
                strangers = _culprits(task, example, weights, list(watch.by_sample))
    is_split = num_micro_batches > 1 or distributed.world_size() > 1
    if strangers:
        names = ", ".join(strangers[:_NAMED_LAYERS]) + (" and others" if len(strangers) > _NAMED_LAYERS else "")
        message = f"{names} draw at random in ways that depend on a sample's neighbours"
        if is_split:
            raise ValueError(
                f"{message}, so that training would depend on the number of processes ({distributed.world_size()}) and "
                f"micro-batches ({num_micro_batches}); set their probabilities to 0, or use one of each"
            )
        log.warning("%s: training is reproducible, but on one process and with one micro-batch alone", message)
    if task.randomness is not None:
        task.randomness = partial(SampleRandomness, strict=is_split and not strangers)


def _depends_on_neighbours(task: Task, example: Batch, weights: Mapping[str, float]) -> bool:
    """Return True if a step on two samples differs from a step with each sample in its own micro-batch.

    BatchNorm layers are set to evaluation mode, since they use other samples without drawing random numbers.
    """
    halves = [
        replace(
            example, streams={name: each.rows(torch.tensor([row])) for name, each in example.streams.items()}, counts={}
        )
        for row in range(2)
    ]
    found = []
    norms = [each for each in task.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
    for norm in norms:
        norm.eval()
    for batches in ([example], halves):
        losses = forward_backward(task, task, batches, weights).reduced()
        gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
        task.zero_grad()
    for norm in norms:
        norm.train()
    (losses, gradients), (split_losses, split_gradients) = found
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    # Compare relative to each gradient's norm: layer scale makes some small at first. Skip gradients at rounding level.
    return any(
        bool((split_losses[name]["loss"] - each["loss"]).abs() > _SPLIT * (each["loss"].abs() + 0.01))
        for name, each in losses.items()
    ) or any(
        bool(gradient.norm() > _NEGLIGIBLE * total)
        and bool((split_gradients[name] - gradient).norm() > _SPLIT_GRADIENT * gradient.norm())
        for name, gradient in gradients.items()
    )


def _culprits(task: Task, example: Batch, weights: Mapping[str, float], names: list[str]) -> list[str]:
    """Return those of the modules `names` whose random numbers depend on the other samples; all if none is found alone."""
    modules = {name: module for name, module in task.named_modules() if name in names}
    for module in modules.values():
        module.eval()
    culprits = []
    if _depends_on_neighbours(task, example, weights):
        culprits.append("parts of the model, which have a generator of their own,")
    for name, module in modules.items() if not culprits else ():
        module.train()
        if _depends_on_neighbours(task, example, weights):
            culprits.append(name)
        module.eval()
    task.train()
    return culprits or names


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated blocks: members of one class with children, in a `ModuleList` or `Sequential`."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = members and all(isinstance(member, type(members[0])) for member in members)
        if alike and any(members[0].children()):
            found += members
        else:
            found += blocks_of(child)
    return found


def prepare(task: Task, device: torch.device, precision: Precision, options: ParallelConfig) -> Callable[[], Task]:
    """Apply activation checkpointing, compilation and sharding to the task's blocks in place. Call it once per task.

    Parameters keep their names. With FSDP2 on CUDA and bf16 passes, the blocks' parameters are gathered in bf16 and
    their gradients are summed in float32. Parameters outside of blocks, such as embeddings and temperatures, stay float32.

    Returns: a function that returns the unsharded task with its current weights for evaluation. Ranks may call the parts
        of that task independently. The function itself is a collective if the weights are sharded.
    Raises: ValueError if there are several processes without a strategy, if FSDP2 or checkpointing is combined with
        BatchNorm, or if selective checkpointing is combined with compilation and random layers.
    """
    world = distributed.world_size()
    if options.strategy == Strategy.none and world > 1:
        raise ValueError(f"parallel.strategy is none, but there are {world} processes; expected parallel=ddp or fsdp")
    if options.strategy == Strategy.fsdp and task.model.has_batch_norm:
        raise ValueError(
            "parallel.strategy is fsdp, but model.image has BatchNorm, which it does not synchronise; use ddp"
        )
    is_sharded = options.strategy == Strategy.fsdp and world > 1
    # A copy without weights, made before the blocks are changed.
    skeleton = copy.deepcopy(task, {id(p): _on_meta(p) for p in task.parameters()}) if is_sharded else task
    blocks = blocks_of(task)
    for block in blocks:
        if options.activation_checkpointing != ActivationCheckpointing.none:
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in block.modules()):
                raise ValueError(
                    f"parallel.activation_checkpointing is {options.activation_checkpointing.value}, but "
                    f"{type(block).__name__} has BatchNorm, whose means would move twice a step; use none"
                )
            keeps = None
            if options.activation_checkpointing == ActivationCheckpointing.selective:
                keeps = _saves_products
                for module in block.modules():
                    if getattr(module, "inplace", False):  # an in-place activation would overwrite a saved tensor
                        module.inplace = False  # type: ignore[assignment]
            _checkpoint(block, keeps, draws=task.randomness is not None, is_compiled=options.compile)
        elif options.compile:
            block.forward = torch.compile(block.forward)
    if is_sharded:
        mesh = init_device_mesh(device.type, (world,))
        # On the CPU, norm layers do not accept parameters of lower precision than their input.
        dtype = torch.bfloat16 if precision == Precision.bf16 and device.type == "cuda" else None
        policy = MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task, mesh=mesh)
    return partial(_whole, task, skeleton) if is_sharded else lambda: task


def _checkpoint(block: nn.Module, keeps: Callable[[], Any] | None, draws: bool, is_compiled: bool) -> None:
    """Recompute a block in the backward pass.

    Args:
        block: block whose `forward` is replaced.
        keeps: `context_fn` of selective checkpointing; None recomputes everything.
        draws: True if the task uses random numbers, which must be the same in the recomputation.
        is_compiled: True if the block is also compiled.
    """
    if not draws:
        contexts = {} if keeps is None else {"context_fn": keeps}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        if is_compiled:
            block.forward = torch.compile(block.forward)
        return
    if is_compiled and keeps is not None:
        raise ValueError(
            "parallel.compile is true and parallel.activation_checkpointing selective, but the model has random layers, "
            "which the two together cannot recompute; use parallel.activation_checkpointing=blocks"
        )
    # Compile inside of the checkpoint, since PyTorch does not compile custom contexts.
    forward = torch.compile(block.forward) if is_compiled else block.forward
    block.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=partial(checkpoint_contexts, keeps))


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def _whole(task: Task, skeleton: Task) -> Task:
    plain = copy.deepcopy(skeleton)
    plain.load_state_dict({name: distributed.full(tensor) for name, tensor in task.state_dict().items()}, assign=True)
    return plain


def _saves_products() -> Any:
    """Return contexts of selective checkpointing: save matrix products, convolutions and attention, recompute the rest."""
    aten = torch.ops.aten
    kept = {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    }  # fmt: skip

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser takes the same steps on sharded and on whole parameters. A collective.

    Two steps are taken on a small matrix and a small position embedding. Without sharded parameters nothing is checked.

    Raises: ValueError if the steps differ, as for optimisers that use statistics of rows and columns.
    """
    sharded = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, DTensor)]
    if not sharded:
        return
    spread = partial(distribute_tensor, device_mesh=sharded[0].device_mesh, placements=[Shard(0)], src_data_rank=None)
    shapes = (256, 128), (1, 64, 128)  # large enough for optimisers that factor only large matrices
    values = [torch.linspace(-1, 1, math.prod(shape), device=sharded[0].device).view(shape) for shape in shapes]

    def stepped(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the parameters after two steps with the options of each group, which may name other algorithms."""
        found = []
        for small, _ in optim.twins(optimizer, lambda: [nn.Parameter(to(value.clone())) for value in values]):
            (group,) = small.param_groups
            for step in range(2):
                for value, parameter in zip(values, group["params"], strict=True):
                    parameter.grad = to((value * (3 + step)).sin())
                small.step()
            found += [distributed.full(parameter.detach()) for parameter in group["params"]]
        return found

    try:
        whole, parts = stepped(Tensor.detach), stepped(spread)
        before = values * len(optimizer.param_groups)
        reason = "its steps on sharded ones differ" if any(map(_differ, before, whole, parts)) else None
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1]
    if reason is not None:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} cannot train sharded weights ({reason}); "
            "use parallel=ddp, or optimizer=adamw"
        )


def _differ(before: Tensor, expected: Tensor, found: Tensor) -> bool:
    """Return True if two steps from the same weights differ by more than rounding."""
    return not (found - expected).norm() <= _ROUNDING * (expected - before).norm()


def wrap(task: Task, device: torch.device) -> nn.Module:
    """Wrap the task in DDP if there are several processes and it is not sharded; else return it unchanged.

    BatchNorm layers are converted to SyncBatchNorm.

    Raises: ValueError if the model has BatchNorm and runs on several CPU processes, which cannot synchronise it.
    """
    if distributed.world_size() == 1 or isinstance(task, FSDPModule):
        return task
    if task.model.has_batch_norm:
        if device.type != "cuda":
            raise ValueError(
                "model.image has BatchNorm, which cannot be synchronised between CPU processes; "
                "run one process, or choose an encoder without it"
            )
        task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
    # Every trained parameter gets a gradient in every step (`freeze.Freeze`), so find_unused_parameters is not needed.
    device_ids = [device.index] if device.type == "cuda" else None
    sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(task, device_ids=device_ids, gradient_as_bucket_view=True, **sync_buffers)
