"""Run the Triton kernels on the CPU: python interpret_kernels.py IN.npz OUT.npz, in a process of its own.

Triton decides when a kernel is defined whether it will be compiled or interpreted. IN holds pickled-free arrays of
every case; OUT gets the results.
"""

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from clipmill.pipeline.kernels_triton import augment_gpu
from clipmill.pipeline.slot import ITEM
from clipmill.pipeline.spec import Blur, VideoSpec

_patch = interpreter._patch_lang_tensor


def _patch_for_new_numpy(tensor, scope):
    """Triton 3.6 makes loop bounds with int(array of one element), which numpy 2.4 has stopped to accept."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def main(source: str, target: str) -> None:
    interpreter._patch_lang_tensor = _patch_for_new_numpy
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results = {}
    with np.load(source) as cases:
        for name, case in json.loads(str(cases["cases"])).items():
            items = cases[f"{name}/items"].view(ITEM)[..., 0]
            steps = cases[f"{name}/steps"]
            ops = (Blur(**case["blur"]),) if case["blur"] else ()
            spec = VideoSpec(**case["spec"], ops=ops)
            tables = [torch.from_numpy(array.view(np.uint8).reshape(-1)) for array in (items, steps)]
            dtype = getattr(torch, case["dtype"])
            payload = torch.from_numpy(cases[f"{name}/payload"])
            out = augment_gpu(payload, items, spec, steps, (tables[0], tables[1]), dtype)
            assert out.dtype == dtype
            results[name] = out.float().numpy()
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
