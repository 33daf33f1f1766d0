"""`sssd clusters`: every image in the folder of its cluster, nearest first, and nothing of the user's replaced."""

import csv
import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.commands import one_line, sssd
from helpers.disk import contents
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig
from sssd_zoo.files import run_folder, write_json
from sssd_zoo.files.run_folder import mark
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.pipeline.clusters import folder_names, safe_name
from sssd_zoo.training.runs import save_config

WORDS = ["--model", "sssd_resnet18_cifar", "--k", "3", "--device", "cpu", "--unlabelled"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    for number in range(12):
        write(root / ("a" if number % 2 else "b") / f"{number:02} é.png", picture(number))
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """What `sssd clusters` reads of a run of `sssd fit` on images without labels."""
    run = tmp_path_factory.mktemp("fit") / "run"
    assert sssd("pseudo-label", "--data", photos, "--out", run / "labels", *WORDS) == 0
    save_config(run, DataConfig(data=str(photos), unlabelled=True))
    write_json(run / "metrics.json", {"data": "photos"})
    name(run, [f"cluster {number}" for number in range(3)])
    return run


def name(run: Path, names: list[str]) -> None:
    (run / "model").mkdir(exist_ok=True)
    write_json(run / "model" / "config.json", {"label_names": names})


def listing(out: Path) -> list[dict[str, str]]:
    with (out / "clusters.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_lies_in_its_cluster_the_nearest_first(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert sssd("clusters", run, "--out", out) == 0
    assert "12 images in 3 folders" in capsys.readouterr().out
    labels = PseudoLabels.load(run / "labels")
    rows = listing(out)
    assert sorted(int(row["row"]) for row in rows) == list(range(12))
    for row in rows:
        place = int(np.flatnonzero(labels.rows == int(row["row"]))[0])
        assert labels.labels[place] == int(row["cluster"])
        assert row["file"].startswith(f"cluster-{row['cluster']}/{row['rank']}-")
        assert row["path"] == str(photos / labels.paths[place])
        assert (out / row["file"]).read_bytes() == Path(row["path"]).read_bytes()
        assert float(row["distance"]) == pytest.approx(float(labels.distances[place]), rel=1e-4)
    for cluster in range(3):
        distances = [float(row["distance"]) for row in rows if row["cluster"] == str(cluster)]
        assert distances == sorted(distances)
        assert next(row["rank"] for row in rows if row["cluster"] == str(cluster)) == "1"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {row["file"] for row in rows} == files - {"clusters.csv", ".sssd-zoo.json"}


def test_pages_are_read_as_the_run_read_them(tmp_path, capsys):
    pytest.importorskip("tifffile")
    data, run = tmp_path / "scans", tmp_path / "run"
    data.mkdir()
    for side, count in ((16, 12), (32, 2)):
        first, *others = (picture(number, side).convert("L") for number in range(count))
        first.save(data / f"{side}.tif", save_all=True, append_images=others)
    how = {"pages": "all", "max_pixels": 300}  # the larger pages are left out
    settings = [f"--{name}={value}" for name, value in how.items()]
    assert sssd("pseudo-label", "--data", data, "--out", run / "labels", *WORDS, *settings, "--max_corrupt", "2") == 0
    save_config(run, DataConfig(data=str(data), unlabelled=True, **how))
    assert sssd("clusters", run, "--out", tmp_path / "out") == 0
    assert "12 images in 3 folders" in capsys.readouterr().out
    rows = listing(tmp_path / "out")
    assert sorted(int(row["page"]) for row in rows) == list(range(1, 13))
    for row in rows:
        assert row["path"] == str(data / "16.tif")
        assert row["file"].endswith(f"-16-page-{row['page']}.png")
        page = np.asarray(picture(int(row["page"]) - 1, 16).convert("L"))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / row["file"])), page)
    # Labels without a run: how their images are read is said again.
    words = ["clusters", run / "labels", "--data", f"[{data}]", "--out", tmp_path / "again"]
    assert sssd(*words) == 2
    assert "these pseudo labels belong to other data" in one_line(capsys)
    assert sssd(*words, *settings) == 0
    assert (tmp_path / "again" / "clusters.csv").read_bytes() == (tmp_path / "out" / "clusters.csv").read_bytes()

    words = [WORDS[1], "--data", data, "--out", tmp_path / "e.parquet", *settings, "--max_corrupt=2", "--workers=0"]
    assert sssd("embed", *words) == 0
    capsys.readouterr()
    assert sssd("search", WORDS[1], tmp_path / "e.parquet", tmp_path / "out" / rows[0]["file"]) == 0
    assert f"1.0000  {data / '16.tif'}, row {rows[0]['row']}" in capsys.readouterr().out


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_links(link, run, tmp_path):
    assert sssd("clusters", run, "--out", tmp_path / "out", "--link", link) == 0
    for row in listing(tmp_path / "out"):
        file = tmp_path / "out" / row["file"]
        assert file.is_symlink() == (link == "symbolic")
        assert os.path.samefile(file, row["path"])  # noqa: PTH121
    assert sssd("clusters", run, "--out", tmp_path / "out", "--overwrite") == 0
    assert all(Path(row["path"]).read_bytes() for row in listing(tmp_path / "out")), "the originals are where they were"


def test_named_clusters_and_those_of_one_name(run, tmp_path):
    name(run, ["sea/../side", "cluster 1", "sea/../side"])
    try:
        assert sssd("clusters", run, "--out", tmp_path / "out") == 0
    finally:
        name(run, [f"cluster {number}" for number in range(3)])
    rows = listing(tmp_path / "out")
    assert {row["file"].split("/")[0] for row in rows} == {"sea_.._side", "cluster-1"}
    assert {row["name"] for row in rows} == {"sea/../side", ""}
    merged = [row for row in rows if row["name"]]
    assert {row["cluster"] for row in merged} == {"0", "2"}
    assert [int(row["rank"]) for row in merged] == list(range(1, len(merged) + 1))


def test_classes_are_no_names_of_clusters(run, tmp_path):
    name(run, ["red", "green", "blue"])
    write_json(
        run / "metrics.json", {"data": "photos", "accuracy": [{"name": "SSSD", "exits": [1.0] * 4, "ensemble": 1.0}]}
    )
    try:
        assert sssd("clusters", run, "--out", tmp_path / "out") == 0
    finally:
        name(run, [f"cluster {number}" for number in range(3)])
        write_json(run / "metrics.json", {"data": "photos"})
    assert {row["file"].split("/")[0] for row in listing(tmp_path / "out")} == {f"cluster-{n}" for n in range(3)}


def test_only_what_the_command_wrote_is_replaced(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert sssd("clusters", run, "--out", out) == 0
    (out / "cluster-0" / "1-mine.png").write_text("mine")
    (out / "notes.txt").write_text("mine")
    before = {row["file"] for row in listing(out)}
    assert sssd("clusters", run, "--out", out) == 2
    assert "--overwrite to replace it" in one_line(capsys)
    name(run, ["beach", "wood", "street"])
    try:
        assert sssd("clusters", run, "--out", out, "--overwrite") == 0
    finally:
        name(run, [f"cluster {number}" for number in range(3)])
    assert (out / "cluster-0" / "1-mine.png").read_text() == (out / "notes.txt").read_text() == "mine"
    assert not any((out / file).exists() for file in before)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"cluster-0", "beach", "wood", "street"}


def test_rows_of_parquet_become_files(tmp_path, capsys):
    pictures = [file_bytes(picture(number), "JPEG" if number % 2 else "PNG") for number in range(8)]
    data = write_parquet(tmp_path / "data" / "train.parquet", pictures)
    assert sssd("pseudo-label", "--data", data, "--out", tmp_path / "labels", *WORDS) == 0
    assert sssd("clusters", tmp_path / "labels", "--out", tmp_path / "out") == 2
    assert "say where their images are by --data" in one_line(capsys)
    assert sssd("clusters", tmp_path / "labels", "--out", tmp_path / "out", "--data", data, "--link", "hard") == 0
    for row in listing(tmp_path / "out"):
        number = int(row["row"])
        assert row["file"].endswith(f"-row-{number}.{'jpg' if number % 2 else 'png'}")
        assert (tmp_path / "out" / row["file"]).read_bytes() == pictures[number]
        assert row["path"] == ""
    assert "path" not in pq.read_schema(tmp_path / "labels" / "labels.parquet").names


def test_mistakes(run, photos, tmp_path, capsys):
    assert sssd("clusters", tmp_path, "--out", tmp_path / "out") == 2
    assert "is not a folder of pseudo labels" in one_line(capsys)
    other = tmp_path / "other"
    write(other / "1.png", picture(1))
    assert sssd("clusters", run, "--out", tmp_path / "out", "--data", other) == 2
    line = one_line(capsys)
    assert "belong to other data: 12 images of " in line
    assert "what was read now, 1, is not the same" in line
    assert "have moved" not in line
    assert not (tmp_path / "out").exists()


def test_a_listing_that_was_changed_removes_nothing_elsewhere(run, tmp_path):
    out = tmp_path / "out"
    assert sssd("clusters", run, "--out", out) == 0
    (tmp_path / "thesis.txt").write_text("the only copy")
    lines = (out / "clusters.csv").read_text().splitlines()
    lines += [
        f"0,,1,0,0,,{file}" for file in ("../thesis.txt", "cluster-0/../../thesis.txt", str(tmp_path / "thesis.txt"))
    ]
    (out / "clusters.csv").write_text("\n".join(lines) + "\n")
    assert sssd("clusters", run, "--out", out, "--overwrite") == 0
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_a_listing_that_a_spreadsheet_saved(encoding, marked, run, tmp_path):
    out = tmp_path / "out"
    assert sssd("clusters", run, "--out", out) == 0
    before = {row["file"] for row in listing(out)}
    text = (out / "clusters.csv").read_text().replace(",", ";").replace("\n", "\r\n")
    (out / "clusters.csv").write_bytes((text + "café;;;;;;\r\n").encode(encoding))
    if not marked:  # as earlier versions left it: the files are those of the listing
        mark(out, "clusters")
    name(run, ["beach", "wood", "street"])
    try:
        assert sssd("clusters", run, "--out", out, "--overwrite") == 0
    finally:
        name(run, [f"cluster {number}" for number in range(3)])
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"beach", "wood", "street"}
    assert not any((out / file).exists() for file in before)
    assert all((out / row["file"]).is_file() for row in listing(out))


def test_a_command_that_is_stopped_keeps_the_earlier_images(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert sssd("clusters", run, "--out", out) == 0
    before = contents(out)
    name(run, ["beach", "wood", "street"])
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        for stop in (KeyboardInterrupt(), full):
            with monkeypatch.context() as patch:
                patch.setattr(run_folder, "publish_dir", Mock(side_effect=stop))
                assert sssd("clusters", run, "--out", out, "--overwrite") != 0
            assert contents(out) == before
    finally:
        name(run, [f"cluster {number}" for number in range(3)])


@pytest.mark.parametrize("content", ["[]", '{"label_names": 3}'])
def test_names_that_are_none(content, run, tmp_path, capsys):
    (run / "model" / "config.json").write_text(content)
    try:
        status = sssd("clusters", run, "--out", tmp_path / "out")
    finally:
        name(run, [f"cluster {number}" for number in range(3)])
    if content == "[]":
        assert status == 2
        assert "is no config.json of a network" in one_line(capsys)
    else:
        assert status == 0


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("Sea side", "Sea side"),
        ("..", ""),
        ("a/b", "a_b"),
        ("CON", "_CON"),
        ("-rf", "rf"),
        ("é 💡", "é"),
        ("x" * 99, "x" * 80),
    ],
)
def test_safe_names(name, safe):
    assert safe_name(name) == safe


def test_folders_of_names_that_come_out_alike():
    names = {0: "Sea/side", 1: "sea:side", 2: "Sea/side", 3: "..", 4: "cluster-3"}
    folders = folder_names(names, 12)
    assert folders[0] == folders[2] == "Sea_side"
    assert folders[1] == "sea_side-01"
    assert folders[3] == "cluster-03"
    assert len(set(folders.values())) == 11
    assert folder_names({0: "A", 1: "a-2", 2: "a"}, 3) == {0: "A", 1: "a-2", 2: "a-2-2"}
    json.dumps(folders)
