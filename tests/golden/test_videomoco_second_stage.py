"""Golden numbers of VideoMoCo's second stage: fading keys, dropped frames, the generator, whole steps, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.frame_dropper import FrameScorer, drop_frames, pooled_side
from clipmill.models.losses import unit
from clipmill.models.methods.videomoco import Config, VideoMoCo, adversarial_loss
from clipmill.pipeline.augment import apply_ops
from clipmill.pipeline.spec import Blur, Flip, Gray, Jitter, Normalize, Op, Params

FAMILIES = ("decay_queue", "frame_drop", "generator", "adversarial_steps", "gpu_augment")
SCORER = {
    "dilated": "Conv_BN.0",
    "dilated_norm": "Conv_BN.1",
    "whole": "conv",
    "point": "atrous_block1",
    "atrous.0": "atrous_block6",
    "atrous.1": "atrous_block12",
    "atrous.2": "atrous_block18",
    "project": "conv_1x1_output",
    "narrow": "conv2",
    "repeated": "conv1",
    "lstm": "rnn",
    "score": "fc.0",
}


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "videomoco"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def double(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64)


def close(found: Tensor | None, expected: np.ndarray, what: str, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Compare with the tolerance of the stored type: generators were stored as float32."""
    assert found is not None
    if expected.dtype == np.float32:
        rtol, atol = 1e-5, 1e-6
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol, err_msg=what)


# --- fading keys --------------------------------------------------------------------------------------------


class Nothing(Encoder):
    """An encoder that is never run."""

    stages, spec = ("none",), InputSpec()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width

    def maps(self, x: Tensor, stage: str) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def fading(data: dict[str, np.ndarray], unit_of_age: str) -> VideoMoCo:
    dim, size = data["queue_init"].shape
    config = Config(
        num_frames=1,
        drop=0,
        out_dim=dim,
        queue_size=size,
        temperature=float(data["temperature"]),
        decay=float(data["decay"]),
        decay_unit=unit_of_age,  # type: ignore[arg-type]
    )
    method = VideoMoCo(config, Nothing(dim)).double()
    method.queue.keys.copy_(double(data["queue_init"]))
    return method


def test_fading_by_steps(golden: Path) -> None:
    for data in family(golden, "decay_queue"):
        method = fading(data, "step")
        for step in range(len(data["k_raw"])):
            raw_fake, raw_real = (double(data[f"q_{name}_raw"][step]).requires_grad_() for name in ("fake", "real"))
            q_fake, q_real = unit(raw_fake), unit(raw_real)
            close(q_fake, data["q_fake"][step], "q_fake")
            close(q_real, data["q_real"][step], "q_real")
            loss, logits = method.classify(q_fake, unit(double(data["k_raw"][step])))
            close(logits, data["logits"][step], f"logits of step {step}")
            close(loss, data["loss_d"][step], "loss_d")
            (grad,) = torch.autograd.grad(loss, raw_fake, retain_graph=True)
            close(grad, data["grad_q_fake_raw"][step], "gradient of loss_d")
            loss_g = adversarial_loss(q_fake, q_real)
            close(loss_g, data["loss_g"][step], "loss_g")
            close(
                torch.stack(torch.autograd.grad(loss_g, (raw_fake, raw_real))),
                data["grad_loss_g"][step],
                "gradient of loss_g",
            )
            close(method.queue.keys, data["queue_after"][step], "queue")
            np.testing.assert_array_equal(method.age.numpy(), data["count_after"][step])
            assert int(method.queue.position) == int(data["ptr_after"][step])


def test_fading_by_keys(golden: Path) -> None:
    for data in family(golden, "decay_queue"):
        method = fading(data, "key")
        for step in range(len(data["k_raw"])):
            q, k = (unit(double(data[name][step])) for name in ("q_fake_raw", "k_raw"))
            loss, logits = method.classify(q, k)
            close(logits, data["alt_perkey_logits"][step], f"logits of step {step}")
            close(loss, data["alt_perkey_loss"][step], "loss")


# --- generator ----------------------------------------------------------------------------------------------


def test_dropped_frames(golden: Path) -> None:
    for data in family(golden, "frame_drop"):
        clip, scores = double(data["clip"]).requires_grad_(), double(data["scores"]).requires_grad_()
        found, dropped = drop_frames(clip, scores, int(data["num_drop"]))
        numbers = np.stack([np.flatnonzero(row) for row in dropped.numpy()])
        np.testing.assert_array_equal(numbers, data["dropped_idx"])
        close(found, data["clip_dropped"], "clip")
        found.backward(double(data["grad_out"]))
        close(scores.grad, data["grad_scores"], "gradient of the scores")
        assert clip.grad is None


def official(name: str) -> str:
    """The official name of a tensor of `FrameScorer`."""
    prefix = next(prefix for prefix in sorted(SCORER, key=len, reverse=True) if name.startswith(f"{prefix}."))
    return f"{SCORER[prefix]}.{name.removeprefix(f'{prefix}.')}"


def load(scorer: nn.Module, data: dict[str, np.ndarray], prefix: str) -> None:
    names = {name: official(name) for name in scorer.state_dict() if "num_batches" not in name}
    assert {f"{prefix}{name}" for name in names.values()} == {key for key in data if key.startswith(prefix)}
    with torch.no_grad():
        for name, stored in names.items():
            scorer.state_dict()[name].copy_(double(data[f"{prefix}{stored}"]))


def test_generator(golden: Path) -> None:
    for data in family(golden, "generator"):
        side = data["x"].shape[-1]
        assert pooled_side(side) ** 2 == int(data["embedding_dim"])
        frames, hidden = int(data["output_dim"]), int(data["hidden_dim"])
        scorer = FrameScorer(data["x"].shape[1], frames, side, hidden).double()
        load(scorer, data, "param.")
        x = double(data["x"]).requires_grad_()
        scores = scorer(x)
        close(scores, data["scores"], "scores")
        scores.backward(double(data["grad_out"]))
        close(x.grad, data["grad_x"], "gradient of the clip")
        found = {f"after.{official(name)}": tensor for name, tensor in scorer.state_dict().items()}
        found |= {f"grad.{official(name)}": param.grad for name, param in scorer.named_parameters()}
        stored = {key for key in data if key.startswith(("after.", "grad."))}
        assert any("running" in key for key in stored)
        for key in stored:
            close(found[key], data[key], key)


# --- whole steps --------------------------------------------------------------------------------------------


class TinyTrunk(Encoder):
    """The cases' encoder below its head: convolution of stride (1, 2, 2), normalisation, ReLU, global average."""

    stages, spec = ("res2",), InputSpec()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width
        self.conv = nn.Conv3d(3, width, 3, stride=(1, 2, 2), padding=1, bias=False)
        self.bn = nn.BatchNorm3d(width)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "res2").mean((2, 3, 4))


def official_encoder(name: str) -> str:
    """The official name of a tensor of ours: query.1.0.weight is encoder_q.fc.weight."""
    tower, part, rest = name.split(".", 2)
    return f"{ {'query': 'encoder_q', 'key': 'encoder_k'}[tower] }.{rest if part == '0' else 'fc.' + rest[2:]}"


def encoder_names(method: VideoMoCo) -> dict[str, str]:
    names = [name for name in method.state_dict() if name.startswith(("query.", "key.")) and "num_batches" not in name]
    return {name: f"D.{official_encoder(name)}" for name in names}


def adversary_of(data: dict[str, np.ndarray], strict: bool = False) -> VideoMoCo:
    dim, size = data["queue_init"].shape
    frames, side = data["clip_q"].shape[3], data["clip_q"].shape[-1]
    config = Config(
        num_frames=frames,
        size=side,
        out_dim=dim,
        queue_size=size,
        key_momentum=float(data["momentum_key"]),
        temperature=float(data["temperature"]),
        decay=float(data["decay"]),
        drop=int(data["num_drop"]),
        hidden=int(data["hidden_dim"]),
        strict=strict,
    )
    method = VideoMoCo(config, TinyTrunk(len(data["init.D.encoder_q.conv.weight"]))).double()
    assert method.generator is not None
    load(method.generator, data, "init.G.")
    with torch.no_grad():
        for name, stored in encoder_names(method).items():
            method.state_dict()[name].copy_(double(data[f"init.{stored}"]))
        method.queue.keys.copy_(double(data["queue_init"]))
    return method


@pytest.mark.parametrize("strict", [False, True])
def test_adversarial_steps(golden: Path, strict: bool) -> None:
    """Steps as released; ``strict`` gives the generator the gradient of its own loss, which is stored for step 0."""
    for data in family(golden, "adversarial_steps"):
        method = adversary_of(data, strict)
        generator = method.generator
        assert generator is not None
        params = [param for param in method.parameters() if param.requires_grad]
        decay, momentum = float(data["weight_decay"]), float(data["momentum_sgd"])
        sgd = torch.optim.SGD(params, float(data["lr"]), momentum, weight_decay=decay)
        for step in range(1 if strict else len(data["perms"])):
            x_q, x_k = (double(data[name][step] / 255.0) for name in ("clip_q", "clip_k"))
            out = method.contrast(x_q, x_k, torch.tensor(data["perms"][step]))
            sgd.zero_grad()
            out.loss.backward()
            stored = {"loss_g": out.loss_g, "loss_d": out.loss_d, "q_fake": out.q_dropped, "q_real": out.q_full}
            for name, found in (*stored.items(), ("logits", out.logits), ("loss_d", out.loss)):
                close(found, data[name][step], f"{name} of step {step}")
            np.testing.assert_array_equal(out.dropped.numpy(), data["dropped"][step])
            if step == 0:
                kind = "grad0_lossg" if strict else "grad0_sum"
                for name, param in generator.named_parameters():
                    expected = data[f"{kind}.G.{official(name)}"]
                    scale = float(np.abs(expected).max())
                    np.testing.assert_allclose(
                        param.grad, expected, rtol=1e-5, atol=1e-6 * max(scale, 1.0), err_msg=f"gradient of G.{name}"
                    )
                for name, param in method.query.named_parameters(prefix="query"):
                    close(param.grad, data[f"grad0.D.{official_encoder(name)}"], f"gradient of {name}")
            sgd.step()
            method.after_step(step, len(data["perms"]))
        if strict:
            continue
        state = method.state_dict()
        for name, stored_name in encoder_names(method).items():
            close(state[name], data[f"final.{stored_name}"], f"final {name}")
        for name, tensor in generator.state_dict().items():
            if "num_batches" not in name:
                close(tensor, data[f"final.G.{official(name)}"], f"final G.{name}")
        close(method.queue.keys, data["queue_final"], "queue")
        np.testing.assert_array_equal(method.age.numpy(), data["count_final"])
        assert int(method.queue.position) == int(data["ptr_final"])


# --- augmentation -------------------------------------------------------------------------------------------


def augmented(data: dict[str, np.ndarray], order: np.ndarray, steps: str) -> Tensor:
    """Our operators with the case's factors; ``steps`` names them: j(itter), g(ray), b(lur), f(lip), n(ormalise)."""
    count = len(data["frames"])
    hue = data["hue_v2"] if "b" in steps else data["hue"]
    factors = np.stack([data["brightness"], data["contrast"], data["saturation"], hue], 1)
    every = np.ones(count, bool)
    known: dict[str, tuple[Op, Params]] = {
        "j": (Jitter(maths="kornia"), {"apply": every, "factors": factors, "order": np.tile(order, (count, 1))}),
        "g": (Gray(weights=(0.299, 0.587, 0.114)), {"apply": data["gray"]}),
        "b": (
            Blur(kernel=int(data["blur_kernel"])),
            {"apply": every, "sigma": np.full(count, float(data["blur_sigma"]))},
        ),
        "f": (Flip(), {"apply": data["flip"]}),
        "n": (Normalize(mean=tuple(data["mean"].tolist()), std=tuple(data["std"].tolist())), {}),
    }
    ops, params = zip(*(known[step] for step in steps), strict=True)
    x = double(data["frames"] / 255.0)[:, None]
    return apply_ops(x, ops, params)[:, 0]


@pytest.mark.parametrize(("name", "steps"), [("jitter_only", "j"), ("aug_v1", "gjfn"), ("aug_v2", "jgbfn")])
def test_augmentation(golden: Path, name: str, steps: str) -> None:
    for data in family(golden, "gpu_augment"):
        for row, order in enumerate(data["order"]):
            found = augmented(data, order, steps)
            np.testing.assert_allclose(found, data[name][row], rtol=1e-5, atol=5e-6, err_msg=f"{name}, order {order}")
