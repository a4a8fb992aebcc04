"""Golden numbers of VFS' tracking probe: the trained head on frozen features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.tools.tracker_head import Head, correlate, focal_loss, labels


@pytest.fixture(scope="module")
def files(test_data: Path) -> list[dict[str, torch.Tensor]]:
    found = sorted((test_data / "golden" / "vfs").glob("siamfc_*.npz"))
    assert found
    return [{name: torch.from_numpy(np.asarray(array)) for name, array in np.load(path).items()} for path in found]


def test_the_head_its_loss_and_its_gradients(files: list[dict[str, torch.Tensor]]) -> None:
    for data in files:
        width, channels = data["p.x.weight"].shape[:2]
        head = Head(channels, float(data["hp.out_scale"]), width).double()
        head.load_state_dict({name[2:]: tensor for name, tensor in data.items() if name.startswith("p.")})
        z, x = data["z"].clone().requires_grad_(), data["x"].clone().requires_grad_()
        responses = head(z, x)
        torch.testing.assert_close(responses, data["response"], rtol=1e-9, atol=1e-12)
        size = responses.shape[2], responses.shape[3]
        targets = labels(size, float(data["hp.r_pos"]), 0, int(data["hp.total_stride"])).double().expand_as(responses)
        assert torch.equal(targets, data["labels"])
        loss = focal_loss(responses, targets, float(data["hp.gamma"]))
        torch.testing.assert_close(loss, data["loss"], rtol=1e-9, atol=0)
        loss.backward()
        found = {"z": z.grad, "x": x.grad} | {name: p.grad for name, p in head.named_parameters()}
        expected = {name[2:]: tensor for name, tensor in data.items() if name.startswith("g.")}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_the_search_branch_folded_into_the_kernel(files: list[dict[str, torch.Tensor]]) -> None:
    for data in files:
        width, channels = data["p.x.weight"].shape[:2]
        head = Head(channels, float(data["hp.out_scale"]), width).double()
        head.load_state_dict({name[2:]: tensor for name, tensor in data.items() if name.startswith("p.")})
        kernel, bias = head.fold(data["z"])
        folded = correlate(kernel, data["x"][:, None]) + bias.view(-1, 1, 1, 1)
        torch.testing.assert_close(folded, data["response"], rtol=1e-9, atol=1e-12)
