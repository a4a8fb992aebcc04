"""Golden numbers of CrissCross: loss, heads, sound front end and its augmentation, optimiser, frame times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.heads import mlp
from clipmill.models.methods.crisscross import Config, crisscross_loss, projector
from clipmill.pipeline import augment
from clipmill.pipeline.audio import crop_canvas, log_mel, mask
from clipmill.pipeline.optim import LarcAdam, cosine, ramp
from clipmill.pipeline.sound_spec import LogMel, Mask
from clipmill.pipeline.sound_views import timed_frames
from clipmill.pipeline.spec import Cutout

FAMILIES = (
    "loss", "heads", "logmel", "spec_aug", "lr_schedule", "larc_adam", "frame_indices", "cutout", "gaussian_blur"
)  # fmt: skip
VIEWS = ("v1", "v2", "a1", "a2")
TERMS = ("v1v2", "a1a2", "v1a2", "a1v2", "v1a1", "v2a2")
SIDES = {"v": "video", "a": "audio"}


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "crisscross"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def close(actual: Tensor | np.ndarray | float, expected: np.ndarray, tolerance: float) -> None:
    found = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def load(module: nn.Module, number: int, kind: str, data: dict[str, np.ndarray], name: str) -> None:
    """Set weight and bias of the ``number``-th layer of a kind."""
    layer = [part for part in module.modules() if type(part).__name__ == kind][number]
    with torch.no_grad():
        for what in ("weight", "bias"):
            getattr(layer, what).copy_(torch.from_numpy(data[f"{name}_{what}"]))


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def test_loss_terms_and_gradients(golden: Path) -> None:
    for data in family(golden, "loss"):
        predictors = nn.ModuleDict()
        for side, name in SIDES.items():
            hidden, dim = data[f"{name}_pred_fc1_weight"].shape
            predictors[side] = mlp([dim, hidden, dim], norm="affine").double()
            for kind, number, part in (("Linear", 0, "fc1"), ("BatchNorm1d", 0, "bn"), ("Linear", 1, "fc2")):
                load(predictors[side], number, kind, data, f"{name}_pred_{part}")
        video, audio, sync, asynchronous = data["hp_coeffs_vid_aud_sync_async"].tolist()
        intra, with_sync, with_async = (bool(flag) for flag in data["hp_enabled_intra_sync_async"])
        config = Config(
            intra=intra,
            sync=with_sync,
            asynchronous=with_async,
            video_weight=video,
            audio_weight=audio,
            sync_weight=sync,
            async_weight=asynchronous,
            pre_norm=bool(data["hp_pre_norm"]),
        )
        z = {name: torch.tensor(data[f"z_{name}"], requires_grad=True) for name in VIEWS}
        loss, terms = crisscross_loss(z, predictors, config)
        loss.backward()
        close(loss, data["loss"], 1e-9)
        assert set(terms) == set(TERMS)
        for name in TERMS:
            close(terms[name], data[f"term_{name}"], 1e-9)
        for name in VIEWS:
            grad = z[name].grad
            close(torch.zeros_like(z[name]) if grad is None else grad, data[f"grad_z_{name}"], 1e-8)
            inside = nn.functional.normalize(z[name], dim=1) if config.pre_norm else z[name]
            close(predictors[name[0]](inside), data[f"p_{name}"], 1e-9)
        for side, name in SIDES.items():
            layers = predictors[side]
            for place, part in ((0, "fc1"), (1, "bn"), (3, "fc2")):
                grad = layers[place].weight.grad  # type: ignore[index]
                close(grad, data[f"grad_{name}_pred_{part}_weight"], 1e-8)


@pytest.mark.parametrize("layers", [2, 3])
def test_projector(golden: Path, layers: int) -> None:
    for data in family(golden, "heads"):
        out, dim = data["proj_fc1_weight"].shape
        head = projector(dim, out, layers).double()
        for number, source in enumerate((1, 2, 3) if layers == 3 else (1, 3)):
            load(head, number, "Linear", data, f"proj_fc{source}")
            load(head, number, "BatchNorm1d", data, f"proj_bn{source}")
        x = torch.from_numpy(data["x"])
        close(head(x), data[f"proj{layers}_train_out"], 1e-9)
        last = head[-1]
        assert isinstance(last, nn.BatchNorm1d)
        close(last.running_mean, data[f"proj{layers}_running_mean_last"], 1e-9)  # type: ignore[arg-type]
        close(last.running_var, data[f"proj{layers}_running_var_last"], 1e-9)  # type: ignore[arg-type]
        close(head.eval()(x), data[f"proj{layers}_eval_out_after_one_train_step"], 1e-9)


def test_predictor(golden: Path) -> None:
    for data in family(golden, "heads"):
        hidden, dim = data["pred_fc1_weight"].shape
        head = mlp([dim, hidden, dim], norm="affine").double()
        for kind, number, part in (("Linear", 0, "fc1"), ("BatchNorm1d", 0, "bn"), ("Linear", 1, "fc2")):
            load(head, number, kind, data, f"pred_{part}")
        close(head(torch.from_numpy(data["z"])), data["pred_train_out"], 1e-9)


@pytest.mark.parametrize("pad", ["reflect", "constant"])
def test_log_mel(golden: Path, pad: str) -> None:
    for data in family(golden, "logmel"):
        hz, n_fft = int(data["hp_sample_rate"]), int(data["hp_n_fft"])
        mean, std = data["hp_norm_mean_std"].tolist()
        mel = LogMel(
            hz=hz,
            n_fft=n_fft,
            win=n_fft,
            hop=int(data["hp_hop"]),
            mels=int(data["hp_n_mels"]),
            power_floor=2.2e-16,
            mean=mean,
            std=std,
            pad="reflect" if pad == "reflect" else "constant",
        )
        wave = torch.zeros(1, int(data["hp_duration_s"] * hz))
        pcm = data["waveform_int16"][: wave.shape[1]]
        wave[0, : len(pcm)] = torch.from_numpy(pcm.astype(np.float32) / 32767)
        found = log_mel(wave, mel)
        if pad == "reflect":
            close(found, data["logmel_normalised"], 2e-4)
        else:
            edges = torch.cat([found[..., :2], found[..., -2:]], -1)
            close(edges, data["logmel_normalised_zero_pad_first2_last2_frames"], 2e-4)


def fractions(data: dict[str, np.ndarray], name: str, size: int) -> dict[str, np.ndarray]:
    """Recorded mask draws as the parameters of `Mask`."""
    length, start = data[f"{name}_mask_len"], data[f"{name}_mask_start"]
    room = max(size - int(length.max()), 1)
    return {"length": length[None].astype(np.float64), "start": (start[None] + 0.5) / room}


def test_masks_and_resize_crop(golden: Path) -> None:
    for data in family(golden, "spec_aug"):
        spec = torch.from_numpy(data["spec"])
        bands = mask(spec, Mask(axis="frequency"), fractions(data, "freq", spec.shape[1]))
        close(bands, data["after_freq_mask"], 2e-4)
        close(mask(bands, Mask(axis="time"), fractions(data, "time", spec.shape[2])), data["after_time_mask"], 2e-4)
        tall, wide = data["hp_virtual_crop_scale"].tolist()
        boxes = data["crop_params_i_j_h_w"]
        out = crop_canvas(spec.expand(len(boxes), -1, -1), (tall, wide), boxes)
        close(out[:, None], data["resize_crop_out"], 2e-4)


def test_rates_of_the_released_schedule(golden: Path) -> None:
    """Its pieces are ours; the release lags by one step, since it steps the schedule after the optimiser."""
    for data in family(golden, "lr_schedule"):
        per_epoch = int(data["hp_iters_per_epoch"])
        warmup, total = int(data["hp_warmup_epochs"]) * per_epoch, int(data["hp_epochs"]) * per_epoch
        expected = data["lr_in_force"]
        assert expected.shape == (total, 4)
        close(expected[0], np.full(4, data["hp_initial_optimizer_lr"]), 1e-12)
        for modality in range(2):
            base, final = data["hp_base_lr_vid_aud"][modality], data["hp_final_lr_vid_aud"][modality]
            start = float(data["hp_warmup_lr"]) / base
            share = [ramp(t, warmup - 1, start) for t in range(warmup)]
            share += [cosine(t, total - warmup, final / base) for t in range(total - warmup)]
            close(base * np.array(share)[: total - 1], expected[1:, 2 * modality], 1e-9)
            if data["hp_predictor_constant_vid_aud"][modality]:
                rate = np.full(total - 1, data["hp_predictor_lr_vid_aud"][modality])
            else:
                rate = data["hp_predictor_lr_vid_aud"][modality] / base * expected[1:, 2 * modality]
            close(rate, expected[1:, 2 * modality + 1], 1e-9)


def test_adam_under_larc(golden: Path) -> None:
    for data in family(golden, "larc_adam"):
        count = sum(name.endswith("_init") for name in data)
        params = [nn.Parameter(torch.tensor(data[f"param{number}_init"])) for number in range(count)]
        beta1, beta2 = data["hp_betas"].tolist()
        optimizer = LarcAdam(
            params,
            float(data["hp_lr"]),
            (beta1, beta2),
            float(data["hp_eps_adam"]),
            float(data["hp_weight_decay"]),
            float(data["hp_trust"]),
            float(data["hp_eps_larc"]),
            bool(data["hp_clip"]),
        )
        steps = sum(name.startswith("grad0_step") for name in data)
        assert steps
        for step in range(steps):
            for number, param in enumerate(params):
                param.grad = torch.tensor(data[f"grad{number}_step{step}"])
            optimizer.step()
            for number, param in enumerate(params):
                close(param, data[f"param{number}_after_step{step}"], 1e-9)


def test_frame_numbers(golden: Path) -> None:
    for data in family(golden, "frame_indices"):
        queries, answers = data["native_fps_numframes_targetfps_duration_start"], data["frame_indices"]
        for (fps, count, rate, duration_s, start_s), answer in zip(queries.tolist(), answers, strict=True):
            found = timed_frames(fps, int(count), rate, start_s, duration_s)
            assert found.tolist() == answer[answer >= 0].tolist()


def test_cutout(golden: Path) -> None:
    for data in family(golden, "cutout"):
        side, row, column = data["hp_length_y_x"].tolist()
        clip = torch.from_numpy(data["clip"]).transpose(0, 1)[None]  # (1, T, C, H, W)
        height, width = clip.shape[-2:]
        drawn = {
            "side": np.array([side]),
            "row": np.array([(row + 0.5) / height]),
            "column": np.array([(column + 0.5) / width]),
        }
        out = augment.apply_ops(clip, (Cutout(),), [drawn])
        close(out[0].transpose(0, 1), data["out"], 1e-6)


def test_blur(golden: Path) -> None:
    """The released pair of sigmas is (x, y): two one-dimensional blurs."""
    for data in family(golden, "gaussian_blur"):
        taps = int(data["hp_kernel"])
        across, down = (torch.tensor([sigma], dtype=torch.float32) for sigma in data["hp_sigma_x_y"].tolist())
        image = torch.from_numpy(data["image"]).permute(2, 0, 1)[None, None].float() / 255
        rows = augment.gaussian_blur(image, down, taps, vertical_only=True)
        both = augment.gaussian_blur(rows.transpose(-1, -2), across, taps, vertical_only=True).transpose(-1, -2)
        found = (both[0, 0].permute(1, 2, 0) * 255).round()
        close(found, data["out"].astype(np.float32), 1.0)
