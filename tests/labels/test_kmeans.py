import json
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers.disk import files_up_to
from helpers.labels import blobs, pseudo_labels
from sssd_zoo.errors import UserError
from sssd_zoo.labels.kmeans import kmeans, normalise
from sssd_zoo.labels.pseudo_labels import PseudoLabels, quality, random_labels


def lloyd(features, centroids, iterations):
    """K-means as in a text book, without empty clusters."""
    features, centroids = features.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        nearest = np.array([np.argmin([np.sum((x - c) ** 2) for c in centroids]) for x in features])
        centroids = np.stack([features[nearest == j].mean(axis=0) for j in range(len(centroids))])
    distances = np.array([[np.sum((x - c) ** 2) for c in centroids] for x in features])
    return distances.argmin(axis=1), centroids, distances.min(axis=1)


def python(code, **environment):
    """Runs code in a fresh interpreter, as the kernels of a BLAS are chosen once per process; gives what it printed."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_normalise_works_in_place_and_keeps_zeros():
    features = np.array([[3, 4], [0, 0], [1e-12, 0]], dtype=np.float32)
    result = normalise(features)
    assert result is features
    np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


def test_kmeans_takes_the_steps_of_lloyds_algorithm():
    import faiss

    features, _ = blobs()
    start = faiss.Kmeans(16, 6, niter=0, seed=5, max_points_per_centroid=1000)
    start.train(features)
    found = kmeans(features, 6, seed=5, iterations=4)
    labels, centroids, distances = lloyd(features, start.centroids, 4)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.centroids, centroids, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3, atol=1e-3)
    assert found.inertia == pytest.approx(distances.sum(), rel=1e-4)
    assert found.labels.dtype == np.int64
    assert found.distances.dtype == found.centroids.dtype == np.float32


@pytest.mark.parametrize(("redos", "iterations"), [(1, 6), (3, 6), (1, 60), (2, 60)])
def test_kmeans_is_faiss_called_by_hand_on_all_points(redos, iterations):
    import faiss

    # Many rows are equal, so first centroids are too: clusters get empty while it trains, and faiss splits others.
    features = np.random.default_rng(1).integers(-3, 4, size=(3000, 3)).astype(np.float32)
    by_hand = faiss.Kmeans(3, 150, niter=iterations, nredo=redos, seed=9, max_points_per_centroid=10**6)
    by_hand.train(features)
    distances, labels = by_hand.assign(features)
    assert redos > 1 or any(step["nsplit"] for step in by_hand.iteration_stats)
    found = kmeans(features, 150, seed=9, iterations=iterations, redos=redos)
    _, renumbered = np.unique(labels, return_inverse=True)
    np.testing.assert_array_equal(found.labels, renumbered)
    np.testing.assert_array_equal(found.distances, distances)
    np.testing.assert_array_equal(found.centroids, by_hand.centroids[np.unique(labels)])


def test_kmeans_stops_where_it_has_converged(monkeypatch):
    import faiss

    features, _ = blobs()
    passes, train = [], faiss.Kmeans.train
    monkeypatch.setattr(faiss.Kmeans, "train", lambda *args, **options: passes.append(1) or train(*args, **options))
    converged = kmeans(features, 6, seed=5, iterations=200)
    assert len(passes) < 50
    longer = lloyd(features, converged.centroids, 1)
    np.testing.assert_allclose(converged.centroids, longer[1], rtol=1e-4, atol=1e-4)


def test_kmeans_does_not_subsample():
    # faiss at its defaults would train on 2 * 256 of these rows; the centroids must be the means of all.
    features, group = blobs(n=4000, groups=2)
    found = kmeans(features, 2, seed=0)
    assert quality(found.labels, group)["purity"] == 1
    for label in range(2):
        np.testing.assert_allclose(found.centroids[label], features[found.labels == label].mean(axis=0), atol=1e-3)


def test_kmeans_repeats_bit_by_bit_and_depends_on_the_seed():
    features = np.random.default_rng(2).standard_normal((4000, 64), dtype=np.float32)
    first, again, other = (kmeans(features, 100, seed=seed, iterations=5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.inertia == again.inertia
    assert (first.labels != other.labels).any()


@pytest.mark.parametrize("seed", [-1, 0, 2**31 - 1, 2**40])
def test_kmeans_takes_any_seed(seed):
    assert kmeans(blobs(n=50)[0], 5, seed=seed, redos=2, iterations=2).k == 5


def test_redos_keep_the_best():
    features = np.random.default_rng(4).standard_normal((400, 8), dtype=np.float32)
    one, five = (kmeans(features, 20, seed=0, iterations=10, redos=redos).inertia for redos in (1, 5))
    assert five < one


def test_empty_clusters_leave_no_holes():
    features = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)  # 4 different rows
    found = kmeans(features, 10, seed=0)
    assert found.k_asked == 10
    assert found.k == len(found.centroids) <= 10
    np.testing.assert_array_equal(np.unique(found.labels), np.arange(found.k))
    np.testing.assert_allclose(found.centroids[found.labels], features, atol=1e-2)
    assert found.k < 10


def test_as_many_clusters_as_rows():
    features, _ = blobs(n=20)
    found = kmeans(features, 20, seed=0)
    assert found.k == 20
    assert found.inertia == pytest.approx(0, abs=1e-2)


def test_kmeans_leaves_its_input_alone_and_accepts_a_view():
    features, _ = blobs(n=200)
    wide = np.repeat(features, 2, axis=1)
    kept = wide.copy()
    found = kmeans(wide[:, ::2], 6, seed=0)
    np.testing.assert_array_equal(wide, kept)
    np.testing.assert_array_equal(found.labels, kmeans(features, 6, seed=0).labels)


@pytest.mark.parametrize(
    ("k", "change", "says"),
    [
        (1, {}, "at least 2"),
        (51, {}, "there are 50"),
        (5, {17: np.nan}, "row 17"),
        (5, {49: np.inf}, "row 49"),
    ],
)
def test_kmeans_refuses(k, change, says):
    features, _ = blobs(n=50)
    for row, value in change.items():
        features[row, 3] = value
    with pytest.raises(UserError, match=says):
        kmeans(features, k, seed=0)


def test_kmeans_refuses_one_image_and_no_iterations():
    with pytest.raises(UserError, match="there are 1"):
        kmeans(np.ones((1, 4), dtype=np.float32), 2, seed=0)
    with pytest.raises(UserError, match="1 iteration"):
        kmeans(blobs(n=50)[0], 2, seed=0, iterations=0)


# Each of the three libraries brings an OpenMP runtime and its own BLAS: all of them in turn, then a forked DataLoader
# worker after their threads have run.
TOGETHER = """
import os, sys
import {first}
import sssd_zoo.labels.kmeans, sssd_zoo.labels.pseudo_labels
lazy = 'faiss' in sys.modules, 'sklearn' in sys.modules
import numpy as np, sklearn.cluster, threadpoolctl, torch
x = np.random.default_rng(0).standard_normal((2000, 32), dtype=np.float32)
for _ in range(3):
    torch.mm(torch.from_numpy(x).T, torch.from_numpy(x))
    found = sssd_zoo.labels.kmeans.kmeans(x, 20, seed=0, iterations=3)
    sklearn.cluster.KMeans(4, n_init=1, max_iter=3).fit(x)
loader = torch.utils.data.DataLoader(torch.from_numpy(x), batch_size=500, num_workers=1)
print(*lazy, sum(len(batch) for batch in loader), found.k, os.environ.get('OPENBLAS_CORETYPE'))
print(*[i['architecture'] for i in threadpoolctl.threadpool_info() if 'faiss' in i['filepath'] and 'architecture' in i])
"""


def test_faiss_is_imported_late_and_uses_the_vector_units(monkeypatch):
    import torch

    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    printed = python(TOGETHER.format(first="torch"), OMP_NUM_THREADS="2")
    assert printed[:5] == ["False", "False", "2000", "20", "None"]
    kernel = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if kernel and printed[5:]:  # other systems' wheels hold another BLAS
        assert printed[5:] == [kernel]


@pytest.mark.long
def test_faiss_imported_first_keeps_the_kernel_of_the_user():
    printed = python(TOGETHER.format(first="faiss"), OMP_NUM_THREADS="2", OPENBLAS_CORETYPE="Nehalem")
    assert printed[:5] == ["True", "False", "2000", "20", "Nehalem"]
    assert printed[5:] in ([], ["Nehalem"])


def test_random_labels_are_uniform_seeded_and_without_holes():
    labels = random_labels(20_000, 10, seed=1)
    assert labels.dtype == np.int64
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert np.abs(counts - 2000).max() < 6 * np.sqrt(2000)
    np.testing.assert_array_equal(labels, random_labels(20_000, 10, seed=1))
    assert (labels != random_labels(20_000, 10, seed=2)).any()
    few = random_labels(10, 9, seed=0)
    np.testing.assert_array_equal(np.unique(few), np.arange(few.max() + 1))
    for k in (1, 11):
        with pytest.raises(UserError):
            random_labels(10, k, seed=0)


def test_quality_against_the_definitions():
    random = np.random.default_rng(0)
    truth = random.integers(5, size=300)
    labels = np.where(random.random(300) < 0.7, truth * 2 + random.integers(2, size=300), random.integers(10, size=300))
    table = np.zeros((10, 5))
    for label, true in zip(labels, truth, strict=True):
        table[label, true] += 1

    share = table / 300
    rows, columns = share.sum(axis=1), share.sum(axis=0)
    mutual = sum(
        share[i, j] * np.log(share[i, j] / (rows[i] * columns[j]))
        for i in range(10)
        for j in range(5)
        if share[i, j] > 0
    )
    entropies = [-np.sum(p * np.log(p)) for p in (rows, columns)]
    pairs = [np.sum(t * (t - 1)) / 2 for t in (table, table.sum(axis=1), table.sum(axis=0))]
    expected = pairs[1] * pairs[2] / (300 * 299 / 2)
    found = quality(labels, truth)
    assert found["nmi"] == pytest.approx(mutual / np.mean(entropies))
    assert found["ari"] == pytest.approx((pairs[0] - expected) / ((pairs[1] + pairs[2]) / 2 - expected))
    assert found["purity"] == pytest.approx(sum(table[i].max() for i in range(10)) / 300)


@pytest.fixture
def artefact():
    features, group = blobs(n=60)
    rows = np.delete(np.arange(62), [7, 30])  # two corrupt images were left out
    return pseudo_labels(kmeans(features, 6, seed=0, redos=3), rows, group)


def test_artefact_round_trip(artefact, tmp_path):
    artefact.save(tmp_path / "labels")
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        ".sssd-zoo.json",
        "centroids.safetensors",
        "labels",
        "labels.parquet",
        "pseudo_labels.json",
    ]
    loaded = PseudoLabels.load(tmp_path / "labels")
    for name in ("rows", "labels", "distances", "centroids"):
        before, after = getattr(artefact, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert loaded.meta == artefact.meta
    assert loaded.meta["k"] == loaded.meta["k_asked"] == 6
    assert sum(loaded.meta["sizes"]) == 60
    assert loaded.meta["quality"]["purity"] == 1
    artefact.save(tmp_path / "labels")  # over the old one
    assert [file.name for file in tmp_path.iterdir()] == ["labels"]


def test_artefact_holds_the_documented_columns(artefact, tmp_path):
    import pyarrow.parquet as pq

    artefact.save(tmp_path / "labels")
    schema = pq.read_schema(tmp_path / "labels" / "labels.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("row", "int64"),
        ("label", "int64"),
        ("distance", "float"),
    ]


def test_artefact_refuses_other_data(artefact):
    artefact.check("abc", 60)
    with pytest.raises(UserError, match=r"other data: 60 images .* and what was read now, 58, is not the same"):
        artefact.check("abd", 58)


def test_labels_of_rows_in_any_order(artefact):
    rows = np.array([61, 0, 8])
    np.testing.assert_array_equal(artefact.labels_of(rows), artefact.labels[[59, 0, 7]])
    shuffled = np.random.default_rng(0).permutation(60)
    other = PseudoLabels(
        rows=artefact.rows[shuffled],
        labels=artefact.labels[shuffled],
        distances=artefact.distances[shuffled],
        centroids=artefact.centroids,
        meta=artefact.meta,
    )
    np.testing.assert_array_equal(other.labels_of(artefact.rows), artefact.labels)
    for missing in (7, 62, -1):
        with pytest.raises(UserError, match=f"row {missing} "):
            artefact.labels_of(np.array([0, missing]))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("name", ["labels.parquet", "centroids.safetensors", "pseudo_labels.json"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), _truncate], ids=["missing", "truncated"])
def test_load_refuses_a_damaged_folder(artefact, tmp_path, name, damage):
    artefact.save(tmp_path / "labels")
    damage(tmp_path / "labels" / name)
    with pytest.raises(UserError):
        PseudoLabels.load(tmp_path / "labels")


def test_load_refuses_what_is_no_artefact(artefact, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        PseudoLabels.load(tmp_path / "nowhere")
    artefact.save(tmp_path / "labels")
    (tmp_path / "labels" / "pseudo_labels.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"pseudo_labels\.json is not as this package writes it: data is missing"):
        PseudoLabels.load(tmp_path / "labels")
    fewer = PseudoLabels(**{**vars(artefact), "centroids": artefact.centroids[:-1]})
    fewer.save(tmp_path / "labels")
    with pytest.raises(UserError, match="do not fit"):
        PseudoLabels.load(tmp_path / "labels")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE as on Linux")
def test_a_save_that_fails_keeps_the_old_folder(artefact, tmp_path):
    artefact.save(tmp_path / "labels")
    before = {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    with files_up_to(600), pytest.raises(UserError, match="cannot write"):
        artefact.save(tmp_path / "labels")
    assert {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["labels"]
