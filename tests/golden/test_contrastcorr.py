"""Golden numbers of ContrastCorr: transformations, losses, whole steps, and the pictures that go in.

What concerns evaluation (propagation, parts) is claimed by the tests of the evaluators.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models import correspondence as cc
from clipmill.models.colour import lab8_from_rgb
from clipmill.models.colour_codec import unit_lab
from clipmill.models.frame_pair import scaled_crop, whole
from clipmill.models.methods.contrastcorr import Pair, network_input, terms
from clipmill.models.resample8 import resized, rotated
from clipmill.pipeline.frame_views import frame_pair, pair_rooms

FAMILIES = (
    *("affinity", "concentration", "color_l1", "localise", "inter_video", "step_warm", "step_joint"),
    *("augment", "lab", "pair_sampling"),
)
ELSEWHERE = ("propagation", "vip_metrics")
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "contrastcorr"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(golden.glob(f"{name}_*.npz"))
    assert paths, f"no {name}_*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def tensor(data: dict[str, np.ndarray], name: str, dtype: torch.dtype, grad: bool = False) -> Tensor:
    return torch.tensor(data[name], dtype=dtype, requires_grad=grad)


def close(found: Tensor | None, expected: np.ndarray, what: str, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    assert found is not None, what
    if found.dtype == torch.float32:
        rtol, atol = max(rtol, 1e-4), max(atol, 1e-5)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol, err_msg=what)


def size_of(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    names = [path.name for path in golden.glob("*.npz")]
    assert [name for name in names if not name.startswith(tuple(f"{one}_" for one in FAMILIES + ELSEWHERE))] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_copying_along_affinities(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "affinity"):
        f1, f2 = (tensor(data, name, dtype, grad=True) for name in ("f1", "f2"))
        c1, c2 = (tensor(data, name, dtype) for name in ("c1", "c2"))
        raw = cc.affinity(f1, f2)
        weights, own = (float(data["hp.temp"]) * raw).softmax(1), cc.without_itself(f1)
        c2_est = cc.copied(c1, weights, size_of(c2))
        c1_est = cc.copied(c2, weights.transpose(1, 2), size_of(c1))
        c1_self = cc.copied(c1, own, size_of(c1))
        loss = (c2_est - c2).abs().mean() + 0.1 * (c1_est - c1).abs().mean() + (c1_self - c1).abs().mean()
        loss.backward()
        found = {"aff": raw, "aff_norm": weights, "c2_est": c2_est, "c1_est": c1_est, "c1_self": c1_self}
        found |= {"self_aff_norm": own, "probe_loss": loss, "g.f1": f1.grad, "g.f2": f2.grad}
        for name, value in found.items():
            close(value, data[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concentration(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "concentration"):
        raw, size = tensor(data, "aff", dtype, grad=True), (int(data["hp.h"]), int(data["hp.w"]))
        for sample in data["grid"]:
            close(cc.grid(*size, raw), sample.reshape(-1, 2), "grid")
        loss = cc.concentration(raw, size, int(data["hp.win"]), float(data["hp.temp"]))
        loss.backward()
        close(loss, data["loss"], "loss")
        close(raw.grad, data["g.aff"], "g.aff")


@pytest.mark.parametrize("dtype", DTYPES)
def test_colour_distances(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "color_l1"):
        pred1, pred2 = (tensor(data, name, dtype, grad=True) for name in ("pred1", "pred2"))
        gt1, gt2 = (tensor(data, name, dtype) for name in ("gt1", "gt2"))
        limit = float(data["hp.thr"])
        forward, backward = cc.lab_distance(pred2, gt2), cc.lab_distance(pred1, gt1)
        loss = cc.kept_mean(forward + 0.1 * backward, limit)
        loss.backward()
        found = {"per_sample_fwd": forward, "per_sample_bwd": backward, "loss_plain": cc.kept_mean(forward, None)}
        found |= {"loss_thr": cc.kept_mean(forward, limit), "loss_both_thr": loss}
        found |= {"g.pred1": pred1.grad, "g.pred2": pred2.grad}
        for name, value in found.items():
            close(value, data[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_localisation(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "localise"):
        f1, f2 = (tensor(data, name, dtype, grad=True) for name in ("f1", "f2"))
        size, frame = size_of(f1), size_of(f2)
        every = (cc.grid(*frame, f2) + 1) / 2 * f2.new_tensor(frame[::-1])
        close(every[None], data["grid_flat"], "grid")
        places = cc.expected_places(f1, f2, float(data["hp.temp"]))
        box = cc.box_around(places, size, frame)
        image = tensor(data, "image", dtype).expand(len(f1), -1, -1, -1) / 256
        crop_f, crop_i = (cc.cut(x, box, frame, to) for x, to in ((f2, size), (image, (8 * size[0], 8 * size[1]))))
        probe = (crop_f * tensor(data, "w", dtype)).sum() + crop_i.mean()
        probe.backward()
        found = {"coords": places, "center": places.mean(1), "box": box, "crop": crop_f}
        for name, value in found.items():
            close(value, data[name], name)
        close(crop_i, data["image_crop"], "image_crop", rtol=1e-5, atol=1e-6)
        close(probe, data["probe"], "probe", rtol=1e-6)
        for name, x in (("g.f1", f1), ("g.f2", f2)):  # small differences of large numbers
            atol = 1e-8 if dtype == torch.float64 else 1e-4 * max(1.0, np.abs(data[name]).max())
            close(x.grad, data[name], name, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_videos_of_the_batch(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "inter_video"):
        f1, f2 = (tensor(data, name, dtype, grad=True) for name in ("f1", "f2"))
        c1, tau = tensor(data, "c1", dtype), float(data["hp.temp"])
        inter, mass = cc.across_videos(f2, f1, c1, tau)
        intra = cc.copied(c1, (tau * cc.affinity(f1, f2)).softmax(1), size_of(f2))
        sparse = (1 - mass).abs().mean()
        probe = sparse + (tensor(data, "w", dtype) * (inter - intra)).abs().mean()
        probe.backward()
        found = {"c2_est_inter": inter, "c2_est_intra": intra, "sparse_loss": sparse, "probe_loss": probe}
        for name, value in (found | {"g.f1": f1.grad, "g.f2": f2.grad}).items():
            close(value, data[name], name)


@dataclass
class Toy:
    """One linear layer each way: colour features are ReLU(W mean of 8 x 8), pictures tanh(V features), enlarged."""

    into: Tensor
    back: Tensor

    def encode(self, lab: Tensor) -> Tensor:
        return F.relu(torch.einsum("oc,bchw->bohw", self.into, F.avg_pool2d(lab, 8)))

    def decode(self, features: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("oc,bchw->bohw", self.back, F.interpolate(features, scale_factor=8)))


TERMS = {
    "loss_color": "colour",
    "loss_self": "itself",
    "loss_concentration": "concentration",
    "loss_sparse": "sparsity",
    "loss_consistency": "consistency",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["warm", "joint"])
def test_whole_steps(golden: Path, stage: str, dtype: torch.dtype) -> None:
    for data in family(golden, f"step_{stage}"):
        weight = tensor(data, "p.enc", dtype, grad=True)
        codec = Toy(tensor(data, "p.color_enc", dtype), tensor(data, "p.dec", dtype))
        lab = [(tensor(data, name, dtype).permute(0, 3, 1, 2) - 128) / 128 for name in ("lab1", "lab2")]
        features = [
            F.relu(torch.einsum("oc,bchw->bohw", weight, F.avg_pool2d(network_input(x, data["hp.drop"].tolist()), 8)))
            for x in lab
        ]
        for x in features:
            x.retain_grad()
        limit, tau = float(data["hp.thr"]), float(data["hp.temp"])
        found = terms(
            codec,
            Pair(*features),
            Pair(*lab),
            joint=stage == "joint",
            tau=tau,
            limit=None if limit == -1 else limit,
            window=int(data["hp.win"]),
        )
        loss = torch.stack(list(found.values())).sum()
        loss.backward()
        target, target_lab = features[1], lab[1]
        # The released code resamples the target picture in single precision.
        loose = {"rtol": 1e-5, "atol": 1e-7} if stage == "joint" else {}
        if stage == "joint":
            size, frame = size_of(features[0]), size_of(target)
            places = cc.expected_places(features[0], target, tau)
            box = cc.box_around(places, size, frame)
            close(places, data["coords"], "coords")
            close(8 * box, data["box8"], "box8")
            close(cc.cut(target_lab, box, frame, size_of(lab[0])), data["target_crop"], "target_crop", 1e-5, 1e-6)
            target = cc.cut(target, box, frame, size)
        close(cc.affinity(features[0], target), data["aff"], "aff")
        names = [name for name in data if name.startswith("loss_")]
        assert {TERMS[name] for name in names} == set(found)
        for name in names:
            close(found[TERMS[name]], data[name], name, **loose)
        close(loss, data["loss"], "loss", **loose)
        close(features[0].grad, data["g.f1"], "g.f1", **loose)
        close(features[1].grad, data["g.f2"], "g.f2", **loose)
        close(weight.grad, data["g.p.enc"], "g.p.enc", **loose)


# --- pictures -----------------------------------------------------------------------------------------------


def picture(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


def same(found: Tensor, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected, err_msg=what)


def test_geometry_of_a_pair(golden: Path) -> None:
    for data in family(golden, "augment"):
        angle, ratio, size = int(data["hp.angle"]), float(data["hp.ratio"]), int(data["hp.crop"])
        frames = [picture(data[name]) for name in ("frame1", "frame2")]
        turned = [rotated(frame, angle) for frame in frames]
        same(turned[0], data["rotated1"], "rotated1")
        height, width = (int(ratio * side) for side in turned[0].shape[-2:])
        same(resized(turned[0], height, width, "lanczos4" if ratio < 1 else "cubic"), data["scaled1"], "scaled1")
        drawn = iter(data["crop_draws"].tolist())
        rooms = [width - size, height - size]
        places = [[(next(drawn) + 0.5) / (room + 1) if room > 0 else 0.0 for _ in frames] for room in rooms]
        assert next(drawn, None) is None
        crops = [
            scaled_crop(frame, ratio, size, across, down) for frame, across, down in zip(turned, *places, strict=True)
        ]
        same(crops[0], data["crop1"], "crop1")
        same(crops[1], data["crop2"], "crop2")
        same(crops[0].flip(-1), data["flipped1"], "flipped1")
        np.testing.assert_array_equal(unit_lab(crops[0].flip(-1)), data["tensor1"])
        same(whole(frames[0], int(data["hp.full"])), data["resize_pad1"], "resize_pad1")


def test_lab_and_what_the_networks_see(golden: Path) -> None:
    for data in family(golden, "lab"):
        rgb = torch.from_numpy(data["bgr"][..., ::-1].copy()).permute(2, 0, 1)[None].double() / 255
        lab8 = lab8_from_rgb(rgb)
        same(lab8[0], data["lab"], "lab")
        lab = unit_lab(lab8).double()
        close(lab[0].permute(1, 2, 0), data["color_input"], "color_input")
        close(network_input(lab, [])[0].permute(1, 2, 0), data["encoder_input"], "encoder_input")


def test_pairs_of_frames(golden: Path) -> None:
    for data in family(golden, "pair_sampling"):
        for num_frames, draws, pair in zip(data["num_frames"], data["draws"], data["pair"], strict=True):
            rooms = pair_rooms(int(num_frames), 50)
            assert all(low <= draw < low + count for draw, (low, count) in zip(draws, rooms, strict=True))
            assert frame_pair(int(num_frames), 50, draws.tolist()) == tuple(pair.tolist())
