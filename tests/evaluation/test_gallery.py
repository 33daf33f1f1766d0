"""What the page shows of the images: the sample, thumbnails, copies, neighbours, curves."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.data import load
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.data.image_files import identical, image_names
from sssd_zoo.evaluation.reports.html.curves import Series, chart, stage_charts
from sssd_zoo.evaluation.reports.html.gallery import COLUMNS, sheets, spread
from sssd_zoo.evaluation.similar import brightness, copies, nearest


def clusters(*sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    distances = np.random.default_rng(0).random(len(labels)).astype(np.float32)
    return labels, distances


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 30, 111, 1000])
def test_a_sample_is_spread_over_each_cluster(limit):
    labels, distances = clusters(100, 10, 1)
    chosen = spread(labels, distances, limit)
    assert len(chosen) <= limit
    assert len(set(chosen.tolist())) == len(chosen)
    assert len(chosen) == min(limit, 111) or limit < 111
    ordered = [(labels[place], distances[place]) for place in chosen]
    assert ordered == sorted(ordered)
    if limit >= 7:
        for cluster in (0, 1):
            own = distances[labels == cluster]
            shown = distances[chosen[labels[chosen] == cluster]]
            assert (shown.min(), shown.max()) == (own.min(), own.max())


def test_sheets_hold_the_thumbnails_in_order():
    colours = np.random.default_rng(0).integers(0, 256, (130, 1, 1, 3), dtype=np.uint8)
    made = sheets(np.broadcast_to(colours, (130, 16, 16, 3)).copy())
    assert len(made) == 2
    second = np.asarray(Image.open(io.BytesIO(base64.b64decode(made[1]))).convert("RGB")).astype(int)
    assert second.shape == (3 * 16, COLUMNS * 16, 3)
    for place in range(100, 130):
        row, column = divmod(place - 100, COLUMNS)
        centre = second[16 * row + 8, 16 * column + 8]
        assert np.abs(centre - colours[place, 0, 0]).max() < 40


def test_sheets_of_noise_stay_in_their_budget():
    noise = np.random.default_rng(0).integers(0, 256, (300, 48, 48, 3), dtype=np.uint8)
    budget = 8_000_000 * 300 // 10_000
    assert sum(len(sheet) for sheet in sheets(noise, budget)) <= budget * 4 / 3 + 12


def test_names_and_identical_files_of_a_folder(tmp_path):
    for name, seed in (("a/1.png", 1), ("a/2.png", 2), ("b/c/3.png", 1), ("b/4.png", 4)):
        write(tmp_path / name, picture(seed))
    data = load(tmp_path, unlabelled=True)
    names = image_names(data.encoded, data.rows)
    assert names == ["a/1.png", "a/2.png", "b/4.png", "b/c/3.png"]
    assert identical(data.encoded, data.rows) == [[0, 3]]
    assert image_names(data.encoded, data.rows[2:3]) == ["4.png"]


def test_names_and_identical_images_of_parquet(tmp_path):
    files = [file_bytes(picture(seed)) for seed in (1, 2, 1, 3, 2, 1)]
    data = load(write_parquet(tmp_path / "train.parquet", files))
    assert image_names(data.encoded, data.rows) == [f"row {number}" for number in range(6)]
    assert identical(data.encoded, data.rows) == [[0, 2, 5], [1, 4]]
    assert identical(data.encoded, data.rows[3:]) == []


def test_nearest_neighbours():
    features = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    places, cosines = nearest(features, 5)
    unit = torch.nn.functional.normalize(features)
    expected = (unit @ unit.T).fill_diagonal_(-1)
    torch.testing.assert_close(cosines, expected.topk(5).values)
    torch.testing.assert_close(expected.gather(1, places), cosines)
    assert nearest(features[:2], 8)[0].tolist() == [[1], [0]]


def test_copies_are_those_of_the_same_picture():
    one, other = (np.asarray(picture(seed, 8).resize((32, 32), Image.Resampling.BICUBIC)) for seed in (1, 2))
    brighter = (one * 0.8 + 30).astype(np.uint8)
    small = np.asarray(Image.fromarray(one).resize((24, 24)).resize((32, 32)))
    grey = np.full_like(one, 90)
    thumbnails = np.stack([one, other, brighter, grey, small, grey])
    everyone = torch.tensor([[place for place in range(6) if place != own] for own in range(6)])
    assert copies(thumbnails, everyone, []) == [[0, 2, 4]]
    assert copies(thumbnails, everyone[:, :0], [[3, 5]]) == [[3, 5]]
    means, spans = brightness(thumbnails)
    assert means[3] == 90
    assert spans[3] == 0
    assert spans[0] > 10


LINES = [
    {"step": n, "epoch": n / 10, "loss": 8 / n, "kl": 0.01, "feature": 500 + n, "label_top1": n / 1000, "lr": 0.1}
    for n in range(1, 1001)
]


def test_the_unweighted_term_has_a_chart_of_its_own():
    charts = {each.title: each for each in stage_charts(LINES)}
    assert list(charts) == [
        "Loss and its terms",
        "Feature distance, unweighted",
        "Accuracy while training",
        "Learning rate",
    ]
    assert [name for _, name, _ in charts["Loss and its terms"].legend] == ["loss", "KL"]
    assert all(meaning for each in charts.values() for _, _, meaning in each.legend)
    assert "100%" in charts["Accuracy while training"].svg
    for each in charts.values():
        assert len(re.findall(r"[\d.]+,[\d.]+", each.svg)) < 600, "long curves are averaged"


def test_measures_of_some_epochs_are_drawn_where_they_are():
    lines = [{**line, **({"rank_me": 7.0} if line["step"] % 100 == 0 else {}), "note": "text"} for line in LINES]
    found = next(each for each in stage_charts(lines) if each.title == "Effective rank (RankMe)")
    assert len(re.findall(r"[\d.]+,[\d.]+", found.svg)) == 10
    assert not stage_charts([])


def test_names_in_a_chart_are_escaped():
    drawn = chart("<b>", [Series('"><script>', [0, 1], [1, 2], True, (2, 3))])
    assert "<script" not in drawn.svg
    assert "<b>" not in drawn.svg
    assert drawn.svg.count("<circle") == 2
    assert drawn.svg.count("<rect") == 1
