"""Activation checkpointing, compilation and distribution of the task, applied in this order, by DDP, FSDP2 or HSDP."""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmpretrain import distributed, optim
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Precision, Strategy
from mmpretrain.training.randomness import checkpoint_contexts
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)

_MOST_GRAPHS = 64
_ROUNDING = 0.02  # relative error of a step: some optimisers compute in bf16

# Later releases of torch renamed the parameter.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


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


def num_shards(options: ParallelConfig) -> int:
    """Return the number of processes that share a copy of the weights: 1 if every process has all of them.

    Raises: ValueError if `parallel.shard_degree` does not fit the strategy or the number of processes.
    """
    world, degree = distributed.world_size(), options.shard_degree
    if options.strategy == Strategy.hsdp:
        degree = degree or distributed.local_world_size()
        if degree < 1 or world % degree:
            raise ValueError(
                f"parallel.shard_degree is {degree}; expected a divisor of the {world} processes, such as those of a machine"
            )
        return degree
    if degree is not None:
        raise ValueError(
            f"parallel.shard_degree is {degree}, but parallel.strategy is {options.strategy.value}; choose parallel=hsdp"
        )
    return world if options.strategy == Strategy.fsdp else 1


def is_sharded(options: ParallelConfig) -> bool:
    """Return True if weights are DTensors, sharded over several processes."""
    return options.strategy in (Strategy.fsdp, Strategy.hsdp) and distributed.world_size() > 1


def _mesh(device: torch.device, options: ParallelConfig) -> DeviceMesh | None:
    """Return the mesh of processes that weights are sharded over: [world], or [copies, shards]; None: not sharded."""
    world, shards = distributed.world_size(), num_shards(options)
    if not is_sharded(options):
        return None
    if options.strategy == Strategy.fsdp:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


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
        raise ValueError(
            f"parallel.strategy is none, but there are {world} processes; expected parallel=ddp, fsdp or hsdp"
        )
    if options.strategy in (Strategy.fsdp, Strategy.hsdp) and task.model.has_batch_norm:
        raise ValueError(
            f"parallel.strategy is {options.strategy.value}, but model.image has BatchNorm, which it does not synchronise; "
            "use ddp"
        )
    mesh = _mesh(device, options)
    # A copy without weights, made before the blocks are changed.
    skeleton = task if mesh is None else copy.deepcopy(task, {id(p): _on_meta(p) for p in task.parameters()})
    blocks = blocks_of(task)
    if options.compile:
        # A block is compiled for each kind of call: with and without gradients, with tokens picked, of one size and of any.
        # By default, torch stops compiling after eight without a word.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
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
    if mesh is not None:
        # On the CPU, norm layers do not accept parameters of lower precision than their input.
        dtype = torch.bfloat16 if precision == Precision.bf16 and device.type == "cuda" else None
        policy = MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task, mesh=mesh)
    return partial(_whole, task, skeleton) if mesh is not None else lambda: task


def _checkpoint(block: nn.Module, keeps: Callable[[], Any] | None, draws: bool, is_compiled: bool) -> None:
    """Recompute a block in the backward pass.

    Args:
        block: block whose `forward` is replaced.
        keeps: `context_fn` of selective checkpointing; None recomputes everything.
        draws: True if the task uses random numbers, which must be the same in the recomputation.
        is_compiled: True if the block is also compiled.
    """
    if is_compiled and keeps is not None and draws:
        raise ValueError(
            "parallel.compile is true and parallel.activation_checkpointing selective, but the model has random layers, "
            "which the two together cannot recompute; use parallel.activation_checkpointing=blocks"
        )
    contexts = {} if keeps is None else {"context_fn": keeps}
    if is_compiled and not draws:
        block.forward = torch.compile(partial(checkpoint, block.forward, use_reentrant=False, **contexts))
        return
    if draws:
        contexts = {"context_fn": partial(checkpoint_contexts, keeps)}
    # Compile inside of the checkpoint, since PyTorch does not compile custom contexts.
    forward = torch.compile(block.forward) if is_compiled else block.forward
    block.forward = partial(_recomputed, block, forward, contexts)


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], contexts: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a block that is recomputed in the backward pass, with the same operations.

    Other passes of the step may choose other kernels for the block in between (`choose_kernel`), and may leave casts of its
    weights in autocast's cache, which the recomputation does not have. Selective checkpointing counts operations.
    """
    kernels = [(module, module.fused_attn) for module in block.modules() if hasattr(module, "fused_attn")]

    def once(*args: Any, **kwargs: Any) -> Any:
        for module, is_fused in kernels:
            module.fused_attn = is_fused
        is_cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(is_cached)

    return checkpoint(once, *args, use_reentrant=False, **contexts, **kwargs)


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
    if hasattr(torch.ops.torch_attn, "_varlen_attn"):  # where torch has torch.nn.attention.varlen
        kept.add(torch.ops.torch_attn._varlen_attn.default)

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
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    spread = partial(distribute_tensor, device_mesh=mesh, placements=placements, src_data_rank=None)
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
