"""`sssd search`: the nearest images by faiss are those by hand, and files of other networks or exits are refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.commands import one_line, sssd
from helpers.images import file_bytes, picture, write, write_parquet
from helpers.networks import save_tiny
from sssd_zoo.evaluation.embeddings import EmbeddingFile
from sssd_zoo.pipeline.search import nearest

CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A network, photos, and their embeddings of the exits 4, and 1 to 4."""
    root = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    save_tiny(root / "network", classes=3)
    save_tiny(root / "other", classes=3)
    for number in range(12):
        write(root / "photos" / f"{number:02}.png", picture(number))
    words = ["embed", root / "network", "--data", root / "photos", "--image_size", "32", "--workers", "0", *CPU]
    assert sssd(*words, "--out", root / "e.parquet") == 0
    assert sssd(*words, "--out", root / "all.npy", "--exits", "all") == 0
    return root


def search(place, index, *words) -> int:
    return sssd("search", place / "network", place / index, *words, *CPU)


def cosines(file: EmbeddingFile, exit_name: str) -> np.ndarray:
    values = np.concatenate(list(file.chunks(exit_name))).astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values @ values.T


@pytest.mark.parametrize(("index", "exit_name"), [("e.parquet", "4"), ("all.npy", "4"), ("all.npy", "2")])
def test_the_nearest_are_those_by_hand(index, exit_name, place, capsys):
    photos = sorted((place / "photos").iterdir())
    words = [] if index == "e.parquet" else ["--exit", exit_name]
    assert search(place, index, photos[3], photos[7], "--k", "4", "--format", "jsonl", *words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    similar = cosines(EmbeddingFile(place / index), exit_name)
    assert [one["rank"] for one in found] == [1, 2, 3, 4] * 2
    for query, group in ((3, found[:4]), (7, found[4:])):
        assert [one["row"] for one in group] == np.argsort(-similar[query])[:4].tolist()
        np.testing.assert_allclose([one["similarity"] for one in group], np.sort(similar[query])[::-1][:4], atol=1e-5)
        assert {one["query"] for one in group} == {str(photos[query])}
        assert [one["path"] for one in group] == [str(photos[one["row"]]) for one in group]
    assert found[0]["row"] == 3


def test_chunks_are_as_good_as_one():
    random = np.random.default_rng(0)
    rows = random.standard_normal((50, 6)).astype(np.float32)
    rows[40] = rows[10]  # equal ones: the first comes first
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    queries = unit[[10, 3]].copy()
    whole = nearest(queries, iter([rows.copy()]), 5)
    parts = nearest(queries, (rows[start : start + 7].copy() for start in range(0, 50, 7)), 5)
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)
    assert np.array_equal(whole[1], parts[1])
    assert parts[1][0, :2].tolist() == [10, 40]
    assert nearest(queries, iter([rows.copy()]), 99)[1].shape == (2, 50)


def test_table_and_csv(place, tmp_path, capsys):
    photos = sorted((place / "photos").iterdir())
    assert search(place, "e.parquet", place / "photos", "--k", "2", "--out", tmp_path / "found.csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(photos[0]), "  similarity  image"]
    assert lines[2].split() == ["1.0000", str(photos[0])]
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert rows[0] == {
        "query": str(photos[0]),
        "rank": "1",
        "similarity": "1.000000",
        "row": "0",
        "path": str(photos[0]),
    }
    assert search(place, "e.parquet", photos[0], "--out", tmp_path / "found.csv") == 2
    assert "give --overwrite" in one_line(capsys)
    assert search(place, "e.parquet", photos[0], "--out", tmp_path / "found.csv", "--overwrite") == 0
    (tmp_path / "latest.csv").symlink_to("found.csv")
    assert search(place, "e.parquet", photos[1], "--out", tmp_path / "latest.csv", "--overwrite") == 0
    assert (tmp_path / "latest.csv").readlink() == Path("found.csv")
    assert str(photos[1]) in (tmp_path / "found.csv").read_text().splitlines()[1]
    (tmp_path / "broken.csv").symlink_to("none.csv")
    assert search(place, "e.parquet", photos[0], "--out", tmp_path / "broken.csv") == 2
    assert "is a link to none.csv, which does not exist" in one_line(capsys)
    (tmp_path / "mine.csv").write_text("name,age\n")
    assert search(place, "e.parquet", photos[0], "--out", tmp_path / "mine.csv", "--overwrite") == 2
    assert "is not what `sssd search` found, so it is kept" in one_line(capsys)


def test_rows_without_files_are_named_by_number(place, tmp_path, capsys):
    data = write_parquet(tmp_path / "train.parquet", [file_bytes(picture(number)) for number in range(4)])
    words = ["--image_size", "32", "--workers", "0", *CPU]
    assert sssd("embed", place / "network", "--data", data, "--out", tmp_path / "e.csv", *words) == 0
    capsys.readouterr()
    assert sssd("search", place / "network", tmp_path / "e.csv", place / "photos" / "02.png", "--k", "1", *CPU) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["1.0000", "row", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["network", "e.parquet", "--exit", "2"], "e.parquet has embeddings of exit 4, not of exit 2: give --exit 4"),
        (["other", "e.parquet"], "was made by another network"),
        (["network", "photos/00.png"], "is not a file of `sssd embed`"),
        (["network", "mine.npy"], "was not written by `sssd embed`"),
        (["network", "broken.parquet"], "cannot read"),
        (["network", "none.npy"], "there is no file "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(words, message, place, capsys):
    np.save(place / "mine.npy", np.zeros((3, 4), np.float32))
    (place / "broken.parquet").write_text("PAR1")
    network, index, *others = words
    assert sssd("search", place / network, place / index, place / "photos" / "00.png", *others, *CPU) == 2
    assert message in one_line(capsys)


def test_an_image_that_cannot_be_read_is_told_after_the_others(place, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    photo = place / "photos" / "00.png"
    assert search(place, "e.parquet", tmp_path / "text.png", photo, "--k", "1", "--format", "jsonl") == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["query"] for line in captured.out.splitlines()] == [str(photo)]
    assert "text.png" in captured.err
    assert search(place, "e.parquet", tmp_path / "text.png", photo, "--max_corrupt", "1") == 0
