"""Golden numbers of tracking: the OTB, pysot and got10k toolkits, siamfc-pytorch and VFS' tracker."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.datasets.otb import read
from clipmill.datasets.otb_sequences import canonical
from clipmill.tools import ope
from clipmill.tools.tracker import Tracker, TrackerSettings
from clipmill.tools.tracker_crops import crop_inside, crop_padded, mean_colour
from clipmill.tools.tracker_head import Head, balanced_loss, correlate, focal_loss, labels
from clipmill.tools.tracker_pairs import valid_frames

FAMILIES = ("ope_metrics", "siamfc_track_", "siamfc_parts", "real_")
STRIDE = 8  # of the label maps
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SETTINGS = {  # names in the files: ours
    "exemplar_sz": "exemplar_size",
    "instance_sz": "instance_size",
    "context": "context",
    "scale_num": "scales",
    "scale_step": "scale_step",
    "scale_lr": "scale_rate",
    "scale_penalty": "scale_penalty",
    "window_influence": "window_influence",
    "response_sz": "response_size",
    "response_up": "response_up",
    "total_stride": "stride",
}


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "otb"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    files = sorted(golden.glob(f"{name}*.npz"))
    assert files, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in files]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    names = {path.name for path in golden.glob("*.npz")}
    assert names == {path.name for name in FAMILIES for path in golden.glob(f"{name}*.npz")}


# --- metrics ------------------------------------------------------------------------------------------------

PER_SEQUENCE = {
    "success": lambda frames, curves: curves.success,
    "precision": lambda frames, curves: curves.precision,
    "norm_precision": lambda frames, curves: curves.norm_precision,
    "iou": lambda frames, curves: frames.overlap,
    "overlap": lambda frames, curves: frames.overlap,
    "center_error": lambda frames, curves: frames.error_px,
    "norm_center_error": lambda frames, curves: frames.norm_error,
}
OVERALL = {
    "otb": lambda curves: (curves.auc, curves.precision_20px),
    "pysot": lambda curves: (curves.auc, curves.precision_20px, curves.norm_precision_20),
    "got10k": lambda curves: (curves.auc, curves.precision_20px, curves.success_rate),
}


@pytest.mark.parametrize("toolkit", ope.TOOLKITS)
def test_metrics(golden: Path, toolkit: ope.Toolkit) -> None:
    for data in family(golden, "ope_metrics"):
        found = []
        checked = {f"{toolkit}_overall"}
        for q, kind in enumerate(data["sequence_kinds"]):
            frames = ope.frames(data[f"gt_{q}"], data[f"pred_{q}"], toolkit)
            found.append(ope.curves(frames, toolkit))
            for name, get in PER_SEQUENCE.items():
                if (key := f"{toolkit}_{name}_{q}") in data:
                    np.testing.assert_allclose(get(frames, found[-1]), data[key], atol=1e-9, err_msg=f"{key} {kind}")
                    checked.add(key)
        np.testing.assert_allclose(OVERALL[toolkit](ope.mean(found)), data[f"{toolkit}_overall"], atol=1e-9)
        assert checked == {key for key in data if key.startswith(f"{toolkit}_")}


@pytest.mark.parametrize("toolkit", ope.TOOLKITS)
def test_scores_of_a_real_tracker(golden: Path, test_data: Path, toolkit: ope.Toolkit) -> None:
    for path in sorted(golden.glob("real_*.npz")):
        data = dict(np.load(path))
        corpus = test_data / "data" / "otb"
        archives = {archive.name.split(".")[0].rpartition("_")[2]: archive for archive in corpus.glob("results_OPE_*")}
        results = next((archives[name] for name in archives if path.stem.startswith(f"real_{name.lower()}")), None)
        if results is None:
            pytest.skip(f"the boxes behind {path.name} are not in {corpus}")
        boxes = tracker_boxes(results.read_bytes())
        videos = read(results.parent, sequences=data["sequences"].tolist(), pictures=False)
        found = [ope.score(video.boxes, boxes[video.name], toolkit) for video in videos]
        for name in ("success", "precision", "norm_precision"):
            if (key := f"{toolkit}_{name}") in data:
                np.testing.assert_allclose([getattr(one, name) for one in found], data[key], atol=1e-9, err_msg=key)
        mean = ope.mean(found)
        expected = data[f"{toolkit}_overall_auc_p20"]
        np.testing.assert_allclose((mean.auc, mean.precision_20px), expected, atol=1e-9)


def tracker_boxes(archive: bytes) -> dict[str, np.ndarray]:
    """{sequence: (T, 4)} of an archive with one JSON file per sequence."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                found[canonical(Path(member.name).stem)] = np.array(json.load(file)[0]["res"], float)
    return found


# --- the tracker --------------------------------------------------------------------------------------------


class Network:
    """The tiny backbone and the head of a file."""

    def __init__(self, data: dict[str, np.ndarray], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.w = {name[2:]: torch.from_numpy(array).to(dtype) for name, array in data.items() if name[:2] == "w_"}
        width, channels = self.w["head.x_convs.0.weight"].shape[:2]
        self.head = Head(channels, float(data["cfg_out_scale"]), width).to(dtype)
        names = {f"{side}.{part}": f"head.{side}_convs.0.{part}" for side in "zx" for part in ("weight", "bias")}
        self.head.load_state_dict({ours: self.w[theirs] for ours, theirs in names.items()})

    def __call__(self, patches: np.ndarray) -> Tensor:
        x = torch.from_numpy(patches).permute(0, 3, 1, 2).to(self.dtype)
        x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
        x = F.relu(F.conv2d(x, self.w["backbone.c1.weight"], self.w["backbone.c1.bias"], 2, 3))
        return F.conv2d(F.max_pool2d(x, 3, 2, 1), self.w["backbone.c2.weight"], self.w["backbone.c2.bias"], 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tracking(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "siamfc_track_"):
        given = {name[4:]: array.item() for name, array in data.items() if name.startswith("cfg_")}
        assert given.keys() == SETTINGS.keys() | {"out_scale"}
        settings = TrackerSettings(**{ours: given[theirs] for theirs, ours in SETTINGS.items()})
        network = Network(data, dtype)
        tracker = Tracker(network, settings, network.head)
        frames = data["frames"]
        targets = tracker.start([frames[0]], [data["init_box"]])
        boxes = [targets[0].box]
        for frame in frames[1:]:
            tracker.step(targets, [frame])
            boxes.append(targets[0].box)
        np.testing.assert_allclose(boxes, data["boxes"], atol=1e-3, rtol=0)
        box = data["init_box"]
        centre = float(box[1] - 1 + (box[3] - 1) / 2), float(box[0] - 1 + (box[2] - 1) / 2)
        side = settings.exemplar_side((float(box[3]), float(box[2])))
        patch = crop_inside(frames[0], centre, side, settings.exemplar_size, mean_colour(frames[0]))
        np.testing.assert_allclose(network(patch[None]), data["kernel"], rtol=1e-4, atol=1e-5)


# --- its parts ----------------------------------------------------------------------------------------------


def test_crops(golden: Path) -> None:
    for data in family(golden, "siamfc_parts"):
        image = data["image"]
        border = mean_colour(image)
        for number, (y, x, side, out) in enumerate(data["crop_center_yx_size_out"].tolist()):
            for name, cut in (("vfs", crop_inside), ("siamfc", crop_padded)):
                if (key := f"crop_{name}_{number}") in data:
                    np.testing.assert_array_equal(cut(image, (y, x), side, int(out), border), data[key], err_msg=key)


def test_labels_losses_and_correlation(golden: Path) -> None:
    for data in family(golden, "siamfc_parts"):
        maps = [key for key in data if key.startswith("labels_")]
        assert maps
        for key in maps:
            _, r_pos, r_neg, _ = key.split("_")
            size = data[key].shape[2:]
            found = labels(size, int(r_pos.removeprefix("rpos")), int(r_neg.removeprefix("rneg")), STRIDE)
            np.testing.assert_array_equal(found.expand(data[key].shape), data[key], err_msg=key)
        responses = torch.from_numpy(data["responses"])
        key = next(key for key in maps if key.endswith(f"_rneg0_{responses.shape[-1]}"))
        targets = torch.from_numpy(data[key])
        assert float(focal_loss(responses, targets)) == pytest.approx(float(data["focal_loss"]), rel=1e-5)
        assert float(balanced_loss(responses, targets)) == pytest.approx(float(data["balanced_loss"]), rel=1e-5)
        z, x = torch.from_numpy(data["xcorr_z"]), torch.from_numpy(data["xcorr_x"])
        np.testing.assert_allclose(correlate(z, x[:, None]) * 1e-3, data["xcorr_out"], rtol=1e-4, atol=1e-7)


def test_frames_to_train_on(golden: Path) -> None:
    for data in family(golden, "siamfc_parts"):
        boxes, size = data["pair_anno"], data["pair_image_hw"].tolist()
        np.testing.assert_array_equal(valid_frames(boxes, size, data["pair_cover"]), data["pair_valid_with_cover"])
        np.testing.assert_array_equal(valid_frames(boxes, size), data["pair_valid_no_cover"])
