"""KeyQueue: the last K keys, first in first out, as a buffer that is saved with the model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Init = Literal["normal", "uniform"]


class KeyQueue(nn.Module):
    """K keys of D numbers, with a write position that is saved too.

    init: ``normal`` draws N(0, 1) and divides every key by its norm (MoCo); ``uniform`` draws U(-s, s) with
    s = 1 / sqrt(D / 3), not normalised (VCLR). whole_writes: refuse writes that would wrap around inside (MoCo), so
    that all keys of a batch always lie side by side.

    Buffers: ``keys`` (D, K), a column per key; ``position`` (1,) int64, where the next write begins.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, dim: int, size: int, *, init: Init = "normal", whole_writes: bool = False) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise ValueError(f"a queue needs at least one key of one number, got {size} of {dim}")
        if init == "normal":
            keys = F.normalize(torch.randn(dim, size), dim=0)
        else:
            bound = (dim / 3) ** -0.5
            keys = torch.rand(dim, size).mul_(2 * bound).sub_(bound)
        self.whole_writes = whole_writes
        self.register_buffer("keys", keys)
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @property
    def size(self) -> int:
        """K."""
        return self.keys.shape[1]

    @torch.no_grad()
    def push(self, keys_ND: Tensor) -> Tensor:
        """Overwrite the oldest keys with N new rows, in order; returns the columns written, (N,).

        Of more than K rows only the last K remain. Raises ValueError if ``whole_writes`` is set and K is no multiple
        of N. Pass a copy of ``keys`` to a loss whose backward pass comes after this.
        """
        count = len(keys_ND)
        if self.whole_writes and self.size % count:
            raise ValueError(
                f"a queue of {self.size} keys cannot be filled by batches of {count}; "
                "use a queue_size that is a multiple of the batch size of all processes"
            )
        columns = (self.position + torch.arange(count, device=self.keys.device)) % self.size
        self.position.add_(count).remainder_(self.size)
        kept = slice(max(count - self.size, 0), None)
        self.keys.index_copy_(1, columns[kept], keys_ND[kept].T.to(self.keys.dtype))
        return columns[kept]
