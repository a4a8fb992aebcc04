from __future__ import annotations

import numpy as np
import pytest
import torch

from clipmill.tools.mstcn import IGNORED, MSTCN, label_frames, stage_losses, train_head


def test_output_is_zero_outside_the_mask_and_does_not_see_it() -> None:
    torch.manual_seed(0)
    model = MSTCN(3, 4, stages=3, layers=3, maps=5).eval()
    x = torch.randn(2, 3, 20)
    mask = torch.ones(2, 1, 20)
    mask[1, :, 12:] = 0
    with torch.no_grad():
        scores = model(x * mask, mask)
    assert scores.shape == (3, 2, 4, 20)
    assert (scores[:, 1, :, 12:] == 0).all()
    assert (scores[:, 0] != 0).all()


def test_smoothing_pulls_the_later_frame() -> None:
    scores = torch.randn(1, 1, 3, 4, requires_grad=True)
    target = torch.full((1, 4), IGNORED)
    target[0, 1] = 2
    _, smooth = stage_losses(scores, target, torch.ones(1, 1, 4))
    (grad,) = torch.autograd.grad(smooth.sum(), scores)
    assert (grad[..., 0] == 0).all()
    assert (grad[..., 1:] != 0).any()
    far = torch.tensor([[[[50.0, 0.0], [0.0, 50.0]]]], requires_grad=True)  # steps of 50 are cut at 4
    _, cut = stage_losses(far, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 1, 2))
    assert cut.item() == pytest.approx(0.15 * 16)
    one = stage_losses(scores[..., :1], target[:, 1:2], torch.ones(1, 1, 1))
    assert one[1].item() == 0


@pytest.mark.parametrize("kind", ["mstcn", "linear"])
def test_a_head_learns_what_its_features_say(kind) -> None:
    rng = np.random.default_rng(0)
    videos = []
    for _ in range(4):
        labels = np.repeat(rng.permutation(3), 12)
        videos.append((np.eye(3)[labels].T + 0.1 * rng.normal(size=(3, 36)), labels))
    state = torch.random.get_rng_state()
    heads = [train_head(kind, videos, 3, stages=2, layers=2, maps=8, epochs=50, lr=0.02, seed=1) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for (_, first), (_, second) in zip(heads[0].named_parameters(), heads[1].named_parameters(), strict=True):
        assert torch.equal(first, second)
    right = [(label_frames(heads[0], x) == labels).mean() for x, labels in videos]
    assert min(right) > 0.9


def test_no_video_is_an_error() -> None:
    with pytest.raises(ValueError, match="a temporal head needs training videos"):
        train_head("mstcn", [], 3)
