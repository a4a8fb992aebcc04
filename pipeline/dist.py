"""Several processes: who am I, gathering with and without gradient, exchanging rows, batch normalisation over all.

Everything works without a process group too, where one process is the world. Collectives are called by all processes
in the same order. Importable by methods: nothing here knows the loop or the loader.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.pipeline.draws import fold

_TIMEOUT = timedelta(minutes=30)  # one process may be packing features while the others wait


def rank() -> int:
    """This process's number."""
    return td.get_rank() if td.is_available() and td.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def is_main() -> bool:
    """True in the process that writes files and prints."""
    return rank() == 0


def setup(device: str = "auto") -> torch.device:
    """Join the process group that ``torchrun`` announces in the environment, if any, and choose the device.

    device: ``auto``, ``cpu`` or ``cuda``; each process of a machine takes the CUDA device of its local rank.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device = 'cuda' is not possible; no CUDA device is visible, use --device cpu")
    chosen = torch.device("cpu")
    if has_cuda and device != "cpu":
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"{torch.cuda.device_count()} CUDA devices are visible, but local rank {number} needs its own; "
                "start fewer processes"
            )
        chosen = torch.device("cuda", number)
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not td.is_initialized():
        if chosen.type == "cuda":
            td.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT, device_id=chosen)
        else:
            td.init_process_group("gloo", timeout=_TIMEOUT)
    return chosen


def teardown() -> None:
    """Leave the process group."""
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        sum_(torch.zeros(1))


# --- collectives --------------------------------------------------------------------------------------------


def sum_(x: Tensor) -> Tensor:
    """Add up ``x`` over all processes, in place; returns it. No gradient."""
    if world() > 1:
        td.all_reduce(x)
    return x


def any_(flag: bool) -> bool:
    """True everywhere if it is true in any process."""
    return bool(sum_(torch.tensor([float(flag)])).item()) if world() > 1 else flag


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, (W * n, ...), in rank order; every process has the same n. No gradient."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    td.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_grad(x: Tensor) -> Tensor:
    """`gather` through which gradients flow back to the process that owns the rows, summed over all processes.

    With per-process losses that are averaged (as DDP averages gradients) this gives exactly the gradient of the mean
    loss; a gather without gradient does not.
    """
    return cast(Tensor, _Gather.apply(x)) if world() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = sum_(grads[0].clone(memory_format=torch.contiguous_format))
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_objects(item: Any) -> list[Any]:
    """Small Python objects of all processes, in rank order."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    td.all_gather_object(items, item)
    return items


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the main process's buffers (running statistics, queues)."""
    if world() > 1:
        for buffer in module.buffers():
            td.broadcast(buffer, 0)


# --- shuffling ----------------------------------------------------------------------------------------------


def permutation(count: int, *key: int | str) -> Tensor:
    """A random permutation of range(count), (count,) int64 on the CPU, the same wherever the key is the same."""
    seed = fold(*key) & (1 << 63) - 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def exchange(x: Tensor, order: Tensor) -> Tensor:
    """This process's rows of the global batch put in ``order``: row i is global row order[rank * n + i]. No gradient.

    x: (n, ...) local rows; global rows are counted in rank order. order: (W * n,) permutation, equal everywhere; give
    ``inverse(order)`` to undo. Each row travels once, to the process that needs it.
    """
    n, total = len(x), world()
    assert len(order) == n * total, f"a permutation of {n * total} rows is needed, got {len(order)}"
    order = order.cpu()
    if total == 1:
        return x.detach()[order.to(x.device)]
    me = rank()
    wanted = order.view(total, n)  # row r: what process r needs
    owner = wanted // n
    outgoing = torch.cat([wanted[r][owner[r] == me] for r in range(total)]) - me * n
    incoming = torch.argsort(owner[me], stable=True)  # arrivals are sorted by sender
    send = x.detach()[outgoing.to(x.device)].contiguous()
    received = torch.empty_like(send)
    td.all_to_all_single(
        received,
        send,
        output_split_sizes=[int((owner[me] == r).sum()) for r in range(total)],
        input_split_sizes=[int((owner[r] == me).sum()) for r in range(total)],
    )
    return received[inverse(incoming).to(x.device)]


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``.

    >>> inverse(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return torch.argsort(order)


# --- batch normalisation over all processes -----------------------------------------------------------------


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch normalisation use the statistics of all processes; parameters stay the same objects.

    On CUDA these are torch's `SyncBatchNorm`, elsewhere (where that one does not run) our own with the same maths.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            sync_batch_norm(child, device)
    return module


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the mean and variance over the batches of all processes, on any device."""

    def __init__(self, local: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            local.num_features, local.eps, local.momentum, affine=False, track_running_stats=local.track_running_stats
        )
        self.affine, self.weight, self.bias = local.affine, local.weight, local.bias
        self.running_mean, self.running_var = local.running_mean, local.running_var
        self.num_batches_tracked = local.num_batches_tracked
        self.train(local.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = x.numel() // x.shape[1] * world()
        mean = cast(Tensor, _Sum.apply(x.sum(axes))) / count
        centred = x - mean.view(shape)
        var = cast(Tensor, _Sum.apply(centred.square().sum(axes))) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean), share)
            self.running_var.lerp_(var.detach().to(self.running_var) * (count / max(count - 1, 1)), share)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(input.dtype)


class _Sum(torch.autograd.Function):
    """Sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_(grads[0].clone(memory_format=torch.contiguous_format))


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes, for steps that DDP does not cover."""
    for param in params:
        if param.grad is not None:
            sum_(param.grad).div_(world())
