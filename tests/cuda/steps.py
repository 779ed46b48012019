"""Steps of training on fake CUDA tensors, in a process of its own: python -m tests.cuda.steps CASE [CASE ...].

Fake tensors have shapes, types and a device, and no values: whatever needs a value raises, as do operations on tensors of
several devices. `Watch` adds what they do not notice, except for elementwise operations in float32, which norms and losses
need. A case is STRATEGY:OBJECTIVE+OBJECTIVE, with :FAULT for a layer that does something that it must not; a strategy is
`one` (a single process), ddp, fsdp or hsdp, with -selective or -blocks for activation checkpointing. Prints a line of JSON
for each case, {case: {"error": the error or null, "attentions": the number of calls of attention by segments}}.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.benchmarks import fake_cuda
from analysis.benchmarks.fake_cuda import CUDA
from mmpretrain.batch import Batch
from mmpretrain.config.schema import Precision
from mmpretrain.distributed import LateFlags
from mmpretrain.optim import adamw, grad_norms, gradients, guarded_step
from mmpretrain.schedules import ScheduledValue
from mmpretrain.training import parallel, step
from mmpretrain.training.ema import EMA
from mmpretrain.training.precision import LossScale, autocast
from mmpretrain.training.spikes import LossSpikes
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task
from mmpretrain.training.transfer import Transfer
from tests.distributed.steps import RANDOM, make_batches, make_task, spread

WORLD_SIZE = 4

aten = torch.ops.aten
_INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward}


class Steps:
    """What the trainer computes in every step, on micro-batches that were counted on the host."""

    def __init__(self, task: Task, wrapped: nn.Module, batches: list[Batch], device: torch.device) -> None:
        self.task, self.wrapped, self.batches, self.device = task, wrapped, batches, device
        self.transfer = Transfer(device)
        self.optimizer = adamw(
            task.named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, towers={}
        )
        self.average = EMA(task, ScheduledValue(0.99, "x"))
        self.loss_scale, self.flags = LossScale(Precision.fp16, device, None, 0), LateFlags()
        self.spikes = LossSpikes(list(task.objectives), {}, {}, 100, 6.0, device)

    def step(self) -> None:
        weights = dict.fromkeys(self.task.objectives, 0.5)
        passes = autocast(self.device, Precision.bf16)
        losses = forward_backward(
            self.wrapped, self.task, self.batches, weights, passes, self.loss_scale.scale, self.transfer.start
        )
        self.loss_scale.unscale(gradients(self.optimizer))
        norm = grad_norms(self.optimizer)["all"]
        self.spikes.measure(losses)
        skipped = guarded_step(self.optimizer, norm, 1.0, self.spikes.update())
        self.task.after_step(self.batches[0].progress, skipped)
        self.loss_scale.update(norm)
        self.average.update(self.batches[0].progress, skipped)
        self.flags.post({"skipped": skipped, **self.spikes.flags(), "stop": torch.full((), False, device=self.device)})


class Watch(TorchDispatchMode):
    """Refuse what the host waits for, products in another precision than that of autocast, float16 and dense masks.

    Copies from the host are of the batches given to `pin`, which stand for page-locked memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: set[int] = set()
        self.in_loss = False
        """True while the loss of a whole batch is computed, which is float32."""
        self.allows_dense_masks = False
        self.num_products = self.num_segmented = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self._check_copy(args[0], result, kwargs.get("non_blocking", False))
        elif func is aten.lift_fresh.default and result.device == CUDA:
            raise RuntimeError(f"the host waits for a copy of values of its own to {result.device}")
        elif func is aten.copy_.default:
            self._check_copy(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        else:
            self._check_devices(func, args)
        results = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, Tensor)]
        # Random numbers are drawn as float64 from bits; nothing else may become as wide.
        if any(each.dtype == torch.float64 and each.dim() for each in results) and any(
            each.is_floating_point() and each.dtype != torch.float64 for each in args if isinstance(each, Tensor)
        ):
            raise RuntimeError(f"{func} widens to float64")
        if any(each.dtype == torch.float16 for each in results):
            raise RuntimeError(f"{func} computes in float16")
        mask = args[3] if "scaled_dot_product" in str(func) and len(args) > 3 else None
        is_dense = isinstance(mask, Tensor) and mask.dim() == 4 and mask.stride(2) and mask.shape[2] == mask.shape[3]
        if is_dense and not self.allows_dense_masks:
            raise RuntimeError(f"{func} has a dense mask {list(mask.shape)}")
        if func.overloadpacket in _PRODUCTS or "scaled_dot_product" in str(func) or func.namespace == "torch_attn":
            self.num_products += 1
            self.num_segmented += func.namespace == "torch_attn"
            if results[0].dtype != (torch.float32 if self.in_loss else torch.bfloat16):
                raise RuntimeError(f"{func} computes in {results[0].dtype}")
        return result

    def pin(self, batches: list[Batch]) -> None:
        """Let these batches be copied to the device."""
        for batch in batches:
            for samples in batch.streams.values():
                samples.map(lambda tensor: self._pinned.add(id(tensor)) or tensor)

    def _check_copy(self, source: Tensor, to: Tensor, is_asynchronous: bool) -> None:
        if source.device == to.device:
            return
        if not is_asynchronous or (to.device == CUDA and id(source) not in self._pinned):
            raise RuntimeError(f"the host waits for a copy of {list(source.shape)} from {source.device} to {to.device}")

    def _check_devices(self, func: Any, args: Any) -> None:
        """Refuse what CUDA's kernels accept, but copy or read first: indices on the host, and masks as indices."""
        if func.overloadpacket not in _INDEXING:
            return
        for index in args[1]:
            if index is not None and index.device != args[0].device:
                raise RuntimeError(f"the host waits for a copy of indices {list(index.shape)} to {args[0].device}")
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                raise RuntimeError(f"the host waits for the number of elements of a mask {list(index.shape)}")

    @contextmanager
    def float32_losses(self) -> Iterator[None]:
        """Let coupled losses and their gradients compute in float32."""
        differentiate = step._Coupling._differentiate

        def watched(coupling: Any, name: str) -> Any:
            self.in_loss = True
            try:
                return differentiate(coupling, name)
            finally:
                self.in_loss = False

        with mock.patch.object(step._Coupling, "_differentiate", watched):
            yield


class Fault(nn.Module):
    """Layer behind the image encoder that computes `function` of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.mean().item(),
    "constant": lambda x: x * torch.ones(x.shape[-1]),
    "copied_constant": lambda x: x * torch.tensor([2.0], device=x.device),
    "nonzero": lambda x: x + x[x > 0].sum(),
    "float64": lambda x: (x.double() * 2).to(x.dtype),
    "float32": lambda x: _without_autocast(x.float()).to(x.dtype),
    "float16": lambda x: x.half().to(x.dtype),
    "index": lambda x: x + x[:, torch.tensor([0, 1])].sum(),
    "mask": lambda x: x.clone().index_put_((x.detach() > 0,), torch.zeros((), device=x.device, dtype=x.dtype)),
    "synchronize": lambda x: torch.cuda.synchronize() or x * 2,
    "stream": lambda x: torch.cuda.current_stream().synchronize() or x * 2,
    "pageable": lambda x: x * torch.ones(x.shape[-1]).to(x.device, non_blocking=True),
    "unwaited": lambda x: x * x.mean().to("cpu", non_blocking=True),
    "none": lambda x: x * 2,
}


def _without_autocast(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(-1, -2) @ x


def _waits(*_: Any) -> None:
    raise RuntimeError("the host waits for the device")


def run(case: str) -> dict[str, Any]:
    """Take steps of two micro-batches. Returns: the first error with its place, or None, and the calls of attention."""
    strategy, mix, *faults = case.split(":")
    strategy, _, recomputed = strategy.partition("-")
    names = tuple(mix.split("+"))
    task = make_task(names, 0.1, **RANDOM).float()
    for fault in faults:
        task.model.image.trunk.blocks[0].add_module("drop_path2", Fault(FAULTS[fault]))  # type: ignore[attr-defined]
    batches = [task.counted(batch, dict.fromkeys(names, 0.5)) for batch in make_batches(2)]
    watch = Watch()
    watch.allows_dense_masks = "cappa" in names  # only some of its captions are causal
    try:
        with fake_cuda.fake_ranks(1 if strategy == "one" else WORLD_SIZE, WORLD_SIZE):
            task = fake_cuda.fake_task(task)
            options = spread("none" if strategy == "one" else strategy, activation_checkpointing=recomputed or "none")
            parallel.prepare(task, CUDA, Precision.bf16, options)
            wrapped = fake_cuda.wrap(task)
            on_host = [fake_cuda.fake_batch(batch) for batch in batches]
            watch.pin(on_host)
            steps = Steps(task, wrapped, on_host, CUDA)
            with (
                mock.patch.object(torch.cuda, "synchronize", _waits),
                mock.patch.object(torch.cuda.Stream, "synchronize", _waits),
                mock.patch.object(torch.cuda.Event, "synchronize", _waits),
                watch,
                watch.float32_losses(),
            ):
                for _ in range(1 if isinstance(wrapped, DistributedDataParallel) else 2):
                    steps.step()
        assert watch.num_products, "no product was seen"
        has_texts = set(names) & {"infonce", "causal_lm", "captioning", "mlm"}
        assert watch.num_segmented or not has_texts, "no texts were computed by segments"
    except Exception as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/mmpretrain/" in frame.filename]
        message = next(iter(str(error).splitlines()), "")
        told = f"{type(error).__name__}: {message} ({places[-1].filename}:{places[-1].lineno}: {places[-1].line})"
        return {"error": told, "attentions": watch.num_segmented}
    return {"error": None, "attentions": watch.num_segmented}


def main() -> None:
    warnings.simplefilter("ignore")
    for case in sys.argv[1:]:
        print(json.dumps({case: run(case)}), flush=True)


if __name__ == "__main__":
    main()
