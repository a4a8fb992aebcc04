from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from clipmill.models.encoder import EncoderConfig, build_encoder
from clipmill.models.methods.longshort import TERMS, Aggregator, Config, LongShort, losses
from clipmill.pipeline.draws import Draws

B, N, D, K = 4, 3, 6, 10
CONFIG = Config(
    encoder=EncoderConfig(name="r3d_18", width=0.125), num_frames=2, stride=2, size=12, out_dim=8, queue_size=8
)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(psi_s: Tensor, phi_g: Tensor, xi: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    keys = {term: rows(B, D, seed=place + 10) for place, term in enumerate(TERMS)}
    queues = {
        term: torch.nn.functional.normalize(rows(D, K, seed=place + 20), dim=0) for place, term in enumerate(TERMS)
    }
    return losses(psi_s, phi_g, xi, keys, queues, 0.1)


def clips(method: LongShort, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    config = method.config
    length = config.num_short * config.num_frames
    long_q, long_k = (torch.randn(batch, 3, length, 12, 12, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    rng = torch.Generator().manual_seed(3)
    return long_q, long_k, torch.randn(batch, config.num_short, 3, config.num_frames, 12, 12, generator=rng)


def test_one_short_view_that_is_not_aggregated_makes_the_first_two_terms_alike() -> None:
    x = rows(B, 1, D)
    keys = dict.fromkeys(TERMS, rows(B, D, seed=1))
    queues = dict.fromkeys(TERMS, torch.nn.functional.normalize(rows(D, K, seed=2), dim=0))
    found = losses(x, Aggregator("mean", 1, D)(x), x[:, 0], keys, queues, 0.1)
    assert found["stationary"][0] == found["non_stationary"][0] == found["instance"][0]


def test_only_the_mean_and_the_stationary_term_do_not_know_the_order_of_views() -> None:
    x, order = rows(B, N, D), torch.tensor([2, 0, 1])
    first, second = terms(x, x.mean(1), x[:, 0]), terms(x[:, order], x.mean(1), x[:, 0])
    torch.testing.assert_close(first["stationary"][0], second["stationary"][0])
    for kind in ("mean", "linear", "mlp", "gru"):
        torch.manual_seed(0)
        aggregate = Aggregator(cast(Any, kind), N, D).double()
        assert torch.allclose(aggregate(x), aggregate(x[:, order])) == (kind == "mean"), kind


def test_equal_embeddings_cost_the_logarithm_of_their_number() -> None:
    x = rows(1, D)
    keys = dict.fromkeys(TERMS, x.expand(B, D))
    queues = dict.fromkeys(TERMS, torch.nn.functional.normalize(x, dim=1).T.expand(D, K))
    found = losses(x.expand(B, N, D), x.expand(B, D), x.expand(B, D), keys, queues, 0.07)
    for loss, _ in found.values():
        assert loss.item() == pytest.approx(math.log(1 + K))


def test_the_length_of_an_embedding_does_not_matter_but_of_what_is_aggregated_it_does() -> None:
    x = rows(B, N, D)
    torch.manual_seed(0)
    aggregate = Aggregator("linear", N, D).double()
    base = terms(x, aggregate(x), x[:, 0])
    longer = terms(3 * x, 5 * aggregate(x), 2 * x[:, 0])
    for term in TERMS:
        torch.testing.assert_close(base[term][0], longer[term][0])
    scaled = terms(x, aggregate(3 * x), x[:, 0])
    assert not torch.allclose(scaled["non_stationary"][0], base["non_stationary"][0], atol=1e-3)


def test_short_views_tile_the_long_view_or_overlap() -> None:
    record = cast(Any, SimpleNamespace(num_frames=200, fps=Fraction(25)))
    planner = LongShort(replace(CONFIG, num_short=3, num_frames=4)).plan()
    long_q, long_k, *short = (span.frames for span in planner(record, Draws(0), 0).spans)
    assert long_q == long_k == short[0] + short[1] + short[2]
    assert np.all(np.diff(long_q) == 2)
    assert len({view.key for view in planner.views}) == 5  # every view draws an augmentation of its own
    assert not any(view.augment.per_frame for view in planner.views)  # type: ignore[union-attr]
    planner = LongShort(replace(CONFIG, num_short=3, num_frames=4, overlap=2, short_stride=1)).plan()
    long_q, _, *short = (span.frames for span in planner(record, Draws(0), 0).spans)
    assert len(long_q) == 8
    assert [frames[0] for frames in short] == [long_q[0], long_q[2], long_q[4]]
    assert all(np.diff(frames).tolist() == [1, 1, 1] for frames in short)


def test_gradients_stop_at_keys_and_reach_the_aggregator_from_its_own_term_alone() -> None:
    torch.manual_seed(0)
    method = LongShort(CONFIG)
    inputs = clips(method)
    for x in inputs:
        x.requires_grad_()
    found = method.contrast(*inputs, None)
    aggregator = list(method.aggregate.parameters())
    for term in ("stationary", "instance"):
        grads = torch.autograd.grad(found[term][0], aggregator, allow_unused=True, retain_graph=True)
        assert all(grad is None for grad in grads)
    assert all(
        grad.abs().sum() > 0 for grad in torch.autograd.grad(found["non_stationary"][0], aggregator, retain_graph=True)
    )
    sum(loss for loss, _ in found.values()).backward()  # type: ignore[union-attr]
    assert inputs[1].grad is None
    assert all(param.grad is None for param in method.key.parameters())
    assert inputs[0].grad is not None
    assert inputs[2].grad is not None


def test_queues_hold_the_latest_keys_of_their_own_space() -> None:
    torch.manual_seed(0)
    method = LongShort(replace(CONFIG, queue_size=10, key_momentum=1.0))  # 4 does not divide 10
    before = {term: method.queue(term).keys.clone() for term in TERMS}
    long_q, long_k, short = clips(method)
    with torch.no_grad():
        for step in range(3):
            method.contrast(long_q, long_k + step, short, None)
            method.after_step(step, 3)
        last = torch.nn.functional.normalize(method._embed(method.key, long_k + 2, TERMS), dim=-1)
    for place, term in enumerate(TERMS):
        queue = method.queue(term)
        assert int(queue.position) == 2
        kept = (queue.keys == before[term]).all(0)
        assert not kept.any()
        torch.testing.assert_close(queue.keys[:, [8, 9, 0, 1]].T, last[:, place], rtol=1e-4, atol=1e-5)


def test_keys_are_pushed_after_the_loss_and_follow_once_per_step() -> None:
    torch.manual_seed(0)
    method = LongShort(replace(CONFIG, key_momentum=0.5))
    twin = LongShort(replace(CONFIG, key_momentum=0.5))
    twin.load_state_dict(method.state_dict())
    with torch.no_grad():
        for param in method.query.parameters():
            param.add_(0.1)
        name, weight = next(iter(method.key.named_parameters()))
        expected = 0.5 * weight + 0.5 * method.query.get_parameter(name)
        first = method.contrast(*clips(method), None)
        method.contrast(*clips(method), None)  # another part of one accumulated batch
    torch.testing.assert_close(method.key.get_parameter(name), expected)
    keys = twin.queue("instance").keys
    similarity = first["instance"][1][:, 1:] * method.config.temperature
    assert similarity.shape == (4, keys.shape[1])
    with torch.no_grad():
        x = torch.nn.functional.normalize(method._embed(method.query, clips(method)[0], TERMS[2:])[:, 0], dim=1)
    torch.testing.assert_close(similarity, x @ keys, rtol=1e-3, atol=1e-4)  # those of before the push


def test_parts_of_the_features_are_encoders_of_their_own() -> None:
    torch.manual_seed(0)
    method = LongShort(replace(CONFIG, stationary_share=0.25)).eval()
    found = method.encoders()
    assert list(found) == ["encoder", "stationary", "non_stationary"]
    x = torch.randn(2, 3, 4, 12, 12)
    with torch.no_grad():
        whole, psi, phi = (encoder(x) for encoder in found.values())
    assert psi.shape == (2, 16)
    assert torch.equal(whole, torch.cat([psi, phi], 1))
    again = build_encoder(**{"name": found["stationary"].recipe["name"], **found["stationary"].recipe["options"]})  # type: ignore[index]
    again.load_state_dict(found["stationary"].state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), psi)
    with pytest.raises(ValueError, match="channels 0 to 65 are no part of the 64 features"):
        build_encoder("channel_range", last=65, width=0.125)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_short": 0}, "num_short = 0 is not possible"),
        ({"stationary_share": 1.0}, "stationary_share = 1.0 is not possible; it must be between 0 and 1"),
        ({"overlap": 2}, "overlap = 2 is not possible; it must be at least 0 and less than num_frames"),
        ({"short_stride": 3}, "short_stride = 3 is not possible"),
        ({"weights": (0.0, 0.0, 0.0)}, "not all 0"),
    ],
)
def test_options_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_groups_must_divide_the_batch() -> None:
    method = LongShort(replace(CONFIG, groups=3))
    with pytest.raises(ValueError, match="4 samples per process cannot be cut into 3 groups"):
        method.contrast(*clips(method), None)
