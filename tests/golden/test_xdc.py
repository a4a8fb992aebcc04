"""Golden numbers of XDC and its siblings: whitening, k-means, balanced epochs, pseudo-label losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.models import clustering
from clipmill.models.methods.xdc import MODALITIES, TARGETS, Modality, Variant, cluster_loss, joined

FAMILIES = ("pca_whiten_l2", "kmeans_lloyd", "uniform_sampler", "variant_losses", "empty_cluster_split")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "xdc"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def test_whitening(golden: Path) -> None:
    for data in family(golden, "pca_whiten_l2"):
        dim = int(data["hp_pca_dim"])
        found = clustering.unit(clustering.whiten(data["features"], dim))
        np.testing.assert_allclose(found @ found.T, data["gram"], rtol=0, atol=1e-4)
        signs = np.sign((found * data["whitened_l2"]).sum(0))
        np.testing.assert_allclose(found * signs, data["whitened_l2"], rtol=0, atol=1e-4)
        x = data["features"].astype(np.float64)
        values, _ = clustering.principal_axes(x - x.mean(0), dim)
        np.testing.assert_allclose(values, data["eigenvalues_top"], rtol=1e-4)


def test_kmeans(golden: Path) -> None:
    for data in family(golden, "kmeans_lloyd"):
        found = clustering.kmeans(
            data["features"], int(data["hp_k"]), iterations=int(data["hp_niter"]), init=data["init_indices"]
        )
        assert np.array_equal(found.labels, data["assignments"])
        np.testing.assert_allclose(found.centroids, data["final_centroids"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.objective, data["objective_per_iteration"], rtol=1e-5)


def test_faiss_agrees_with_lloyd(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(clustering, "SMALL", 0)
    for data in family(golden, "kmeans_lloyd"):
        found = clustering.kmeans(
            data["features"], int(data["hp_k"]), iterations=int(data["hp_niter"]), init=data["init_indices"]
        )
        assert np.array_equal(found.labels, data["assignments"])
        np.testing.assert_allclose(found.centroids, data["final_centroids"], rtol=0, atol=1e-5)


def test_balanced_epoch(golden: Path) -> None:
    for data in family(golden, "uniform_sampler"):
        size = int(data["hp_epoch_size"])
        labels = data["labels"]
        found = clustering.balanced_epoch(labels, size, np.random.RandomState(int(data["hp_numpy_legacy_seed"])))
        assert np.array_equal(found, data["epoch_indices"])
        sizes = data["cluster_sizes"]
        assert np.array_equal(np.bincount(labels, minlength=len(sizes)), sizes)
        assert np.array_equal(np.bincount(labels[found], minlength=len(sizes)), data["counts_per_cluster"])
        assert int(data["size_per_pseudolabel"]) == size // np.count_nonzero(sizes) + 1


def test_losses_of_all_variants(golden: Path) -> None:
    for data in family(golden, "variant_losses"):
        k, iterations, init = int(data["hp_k"]), int(data["hp_niter"]), data["init_indices"]
        video, audio = data["video_features"], data["audio_features"]

        def cluster(x: np.ndarray, k: int = k, iterations: int = iterations, init: np.ndarray = init) -> np.ndarray:
            return clustering.kmeans(x, k, iterations=iterations, init=init).labels

        labels = {"video": cluster(video), "audio": cluster(audio)}
        assert np.array_equal(labels["video"], data["labels_video_clusters"])
        assert np.array_equal(labels["audio"], data["labels_audio_clusters"])
        both = {"raw": cluster(joined(video, audio, False)), "l2": cluster(joined(video, audio, True))}
        assert np.array_equal(both["raw"], data["labels_concat_raw"])
        assert np.array_equal(both["l2"], data["labels_concat_l2"])
        variants: list[tuple[str, Variant, dict[str, np.ndarray]]] = [
            ("sdc", "sdc", labels),
            ("xdc", "xdc", labels),
            ("mdc", "mdc", labels),
            ("cdc_raw", "cdc", {"both": both["raw"]}),
            ("cdc_l2", "cdc", {"both": both["l2"]}),
        ]
        for name, variant, sets in variants:
            for modality in MODALITIES:
                check(data, name, variant, modality, sets, k)


def check(
    data: dict[str, np.ndarray], name: str, variant: Variant, modality: Modality, sets: dict[str, np.ndarray], k: int
) -> None:
    batch = data["batch_indices"]
    features = torch.tensor(data[f"{modality}_features"][batch].astype(np.float64), requires_grad=True)
    targets = TARGETS[variant][modality]
    logits = [
        features @ torch.from_numpy(data[f"{modality}_head{number}_weight"]).T
        + torch.from_numpy(data[f"{modality}_head{number}_bias"])
        for number in range(1, len(targets) + 1)
    ]
    answers = [torch.from_numpy(sets[target][batch]) for target in targets]
    loss = cluster_loss(logits, answers, [torch.ones(k, dtype=torch.float64) for _ in targets])
    loss.backward()
    assert features.grad is not None
    np.testing.assert_allclose(loss.item(), data[f"{name}_loss_{modality}"], rtol=0, atol=1e-9)
    expected = data[f"{name}_grad_{modality}_feat"]
    np.testing.assert_allclose(features.grad.numpy(), expected, rtol=0, atol=1e-9)


def test_an_empty_cluster_takes_half_of_another(golden: Path) -> None:
    for data in family(golden, "empty_cluster_split"):
        new, donor = clustering.split(data["donor_centroid_before"], float(data["hp_eps"]))
        np.testing.assert_allclose(new, data["new_centroid"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(donor, data["donor_centroid_after"], rtol=0, atol=1e-6)
