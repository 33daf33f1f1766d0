"""`sssd embed`: what the files hold, that a killed run and several processes give the same, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from helpers.commands import ROOT, command, one_line, sssd
from helpers.data import load
from helpers.disk import contents
from helpers.images import file_bytes, picture, write, write_parquet
from helpers.networks import save_tiny
from sssd_zoo.configs import EmbedArgs, ForwardConfig
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.embeddings import EmbeddingFile
from sssd_zoo.evaluation.features import network_features
from sssd_zoo.files import RUN_MARK, run_folder
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline import embed as module

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("network") / "tiny", classes=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """22 files in two folders, of which five are no images: one batch of four has none."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for number in range(22):
        write(root / ("a" if number < 12 else "b") / f"{number:02}.png", picture(number))
    for number in (4, 5, 6, 7, 13):
        (root / ("a" if number < 12 else "b") / f"{number:02}.png").write_text("not an image")
    return root


def embed(network, data, out, *words) -> int:
    return sssd("embed", network, "--data", data, "--out", out, "--batch_size", "4", "--image_size", "32", *CPU, *words)


def expected(network, photos, output) -> np.ndarray:
    """The features of the readable images by the functions that the rest of the package uses."""
    model = load_network(str(network), num_classes=0, output=output)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    data = load(photos, max_corrupt=9)
    return network_features(model, data, ForwardConfig(batch_size=4, precision="fp32", device="cpu")).numpy()


@pytest.mark.parametrize(
    ("ending", "exits", "output"),
    [("parquet", "2", "2"), ("csv", "all", "ensemble"), ("npy", "2", "2"), ("npy", "all", "ensemble")],
)
def test_the_embeddings_are_the_networks_features(ending, exits, output, network, photos, tmp_path, capsys):
    out = tmp_path / f"e.{ending}"
    assert embed(network, photos, out, "--exits", exits) == 0
    assert "17 images of photos" in capsys.readouterr().out
    features = expected(network, photos, output)
    file = EmbeddingFile(out)
    for number, values in zip(file.meta["exits"], features, strict=True):
        np.testing.assert_allclose(np.concatenate(list(file.chunks(number))), values, rtol=1e-5, atol=1e-6)
    rows, paths = file.images()
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert paths == [names[row] for row in rows]
    assert sorted(set(range(22)) - set(rows.tolist())) == [4, 5, 6, 7, 13]
    assert file.meta["folder"] == str(photos)
    assert [Path(one["image"]).name for one in file.meta["left_out"]] == [f"{n:02}.png" for n in (4, 5, 6, 7, 13)]
    assert file.meta["exits"] == (["2"] if exits == "2" else ["1", "2", "3", "4"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_documented_columns(network, photos, tmp_path):
    assert embed(network, photos, tmp_path / "one.parquet", "--dtype", "fp16") == 0
    assert embed(network, photos, tmp_path / "all.parquet", "--exits", "all") == 0
    one = pq.read_schema(tmp_path / "one.parquet")
    assert [(field.name, str(field.type)) for field in one] == [
        ("row", "int64"),
        ("path", "string"),
        ("embedding", "fixed_size_list<element: halffloat>[512]"),
    ]
    assert pq.read_schema(tmp_path / "all.parquet").names[2:] == [f"embedding_{number}" for number in range(1, 5)]
    assert embed(network, photos, tmp_path / "all.npy", "--exits", "all", "--dtype", "fp16") == 0
    array = np.load(tmp_path / "all.npy")
    assert (array.shape, array.dtype) == ((17, 4, 512), np.float16)
    assert (tmp_path / "all.npy.csv").read_text().splitlines()[:2] == ['"row","path"', '0,"a/00.png"']
    assert json.loads((tmp_path / "all.npy.json").read_text())["count"] == 17
    assert embed(network, photos, tmp_path / "one.csv") == 0
    header = (tmp_path / "one.csv").read_text().splitlines()[0].replace('"', "").split(",")
    assert header == ["row", "path", *(f"embedding_{number}" for number in range(512))]


def test_the_snippet_of_the_docs(network, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert embed(network, photos, tmp_path / "features.parquet") == 0
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(compile(code, "docs/features.md", "exec"), names)
    assert names["features"].shape == (17, 512)
    assert names["made_by"]["exits"] == ["4"]
    assert Path(names["made_by"]["folder"], names["names"][0]).is_file()


def test_unit_length_and_rows_of_parquet(network, tmp_path):
    data = write_parquet(tmp_path / "data" / "train.parquet", [file_bytes(picture(number)) for number in range(6)])
    assert embed(network, data, tmp_path / "e.npy", "--normalise") == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "e.npy"), axis=1), 1, rtol=1e-5)
    file = EmbeddingFile(tmp_path / "e.npy")
    assert file.images()[1] == [None] * 6
    assert file.meta["folder"] is None


def test_any_timm_network(photos, tmp_path, monkeypatch, capsys):
    create = timm.create_model
    torch.manual_seed(0)
    plain = create("test_vit", num_classes=5).eval()

    def made(name, *args, pretrained=False, **kwargs):  # its weights are not to be had offline
        model = create(name, *args, **kwargs)
        model.load_state_dict(plain.state_dict(), strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", made)
    words = ["--data", str(photos), "--out", str(tmp_path / "e.npy"), *CPU]
    assert sssd("embed", "test_vit", *words) == 0
    assert np.load(tmp_path / "e.npy").shape == (17, plain.num_features)
    assert EmbeddingFile(tmp_path / "e.npy").meta["exits"] == ["final"]
    assert sssd("embed", "test_vit", *words, "--overwrite", "--exits", "2") == 2
    assert "'test_vit' has no exits to choose from: leave out --exits 2" in one_line(capsys)


@pytest.mark.parametrize("ending", ["parquet", "csv", "npy"])
def test_a_stopped_run_resumes_to_the_same_bytes(ending, network, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PART", 8)
    assert embed(network, photos, tmp_path / "whole" / f"e.{ending}", "--exits", "all") == 0
    write_part, left = module.Parts.write, 1

    def stopping(self, *args):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write_part(self, *args)

    out = tmp_path / "stopped" / f"e.{ending}"
    with monkeypatch.context() as patch:
        patch.setattr(module.Parts, "write", stopping)
        assert embed(network, photos, out, "--exits", "all") == 130
    assert not out.exists()
    assert embed(network, photos, out, "--exits", "2") == 2
    assert "holds an unfinished embedding of other settings or data (exits differ)" in one_line(capsys)
    assert embed(network, photos, out, "--exits", "all", "--max_pixels", "1000000") == 2
    assert "of other settings or data (max_pixels differ)" in one_line(capsys)
    assert embed(network, photos, out, "--exits", "all") == 0
    assert "resumed: 1 of 3 parts were done before" in capsys.readouterr().out
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "stopped").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_other_settings_discard_the_parts_with_overwrite(network, photos, tmp_path, monkeypatch):
    parts = module.Parts(tmp_path / ".e.npy.parts", 22, 4)
    assert embed(network, photos, tmp_path / "e.npy") == 0
    monkeypatch.setattr(module, "write_embeddings", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert embed(network, photos, tmp_path / "e.npy", "--overwrite") == 130
    assert parts.path(0).is_file()
    monkeypatch.undo()
    assert embed(network, photos, tmp_path / "e.npy", "--overwrite", "--exits", "1") == 0
    assert EmbeddingFile(tmp_path / "e.npy").meta["exits"] == ["1"]
    assert not parts.folder.exists()


def interrupt(monkeypatch, network, photos, out, *words) -> None:
    """Runs `sssd embed` up to the moment before its parts are joined."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert embed(network, photos, out, *words) == 130


@pytest.mark.parametrize("content", [None, "", "[]"], ids=["missing", "cut", "other"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_parts_that_do_not_say_what_they_are_of_are_not_used(
    content, overwrite, network, photos, tmp_path, monkeypatch, capsys
):
    out, new = tmp_path / "e.npy", tmp_path / "new.npy"
    assert embed(network, photos, new, "--exits", "1") == 0
    interrupt(monkeypatch, network, photos, out)
    record = module.parts_of(out) / "identity.json"
    record.unlink() if content is None else record.write_text(content)
    capsys.readouterr()
    assert embed(network, photos, out, "--exits", "1", *(["--overwrite"] if overwrite else [])) == 0
    assert "resumed" not in capsys.readouterr().out
    assert out.read_bytes() == new.read_bytes()
    interrupt(monkeypatch, network, photos, out, "--overwrite")
    record.unlink() if content is None else record.write_text(content)
    assert embed(network, photos, out, "--exits", "1") == 0
    assert not record.parent.exists(), "the file is complete"


@pytest.mark.parametrize("removed", range(4))
def test_a_kill_while_the_parts_are_removed(removed, network, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PART", 8)  # so that there are three
    out, remove, count = tmp_path / "e.npy", run_folder._remove, 0

    def stopping(path):
        nonlocal count
        if module.parts_of(out) in path.parents:
            count += 1
            if count > removed:
                raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_remove", stopping)
        assert embed(network, photos, out) == 130
    whole = out.read_bytes()
    assert module.parts_of(out).is_dir()
    assert embed(network, photos, out, "--exits", "1") == 2
    capsys.readouterr()
    assert embed(network, photos, out) == 0
    assert capsys.readouterr().out == f"done before: {out}\n"
    assert out.read_bytes() == whole
    assert not module.parts_of(out).exists()


@pytest.mark.parametrize("name", ["e.parquet", "e.csv", "e.npy"])
def test_the_same_call_again_changes_nothing(name, network, photos, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "photos", tmp_path / "out" / name
    shutil.copytree(photos, data)
    out.parent.mkdir()
    assert embed(network, data, out) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.parent.iterdir()}
    capsys.readouterr()
    assert embed(network, data, out) == 0
    assert capsys.readouterr().out == f"done before: {out}\n"
    write(data / "b" / "new.png", picture(30))
    assert embed(network, data, out) == 2
    assert "of other settings or data (fingerprint, paths differ)" in one_line(capsys)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.parent.iterdir()}
    (data / "b" / "new.png").unlink()
    (data / "b").rename(data / "c")  # the same content in the same order
    assert embed(network, data, out) == 2
    assert "(paths differ)" in one_line(capsys)
    (data / "c").rename(data / "b")
    assert embed(network, data, out, "--max_corrupt", "4") == 2
    assert "5 images of photos cannot be read, more than max_corrupt 4" in one_line(capsys)
    parts = module.Parts(module.parts_of(out), 22, 4)
    monkeypatch.setattr(module, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert embed(network, data, out, "--overwrite") == 130
    monkeypatch.undo()
    assert parts.path(0).is_file()
    assert embed(network, data, out) == 0, "the complete file is still there"
    assert not parts.folder.exists()
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.parent.iterdir()}
    for path in out.parent.iterdir():
        if path.suffix != ".json" and path != out:
            path.unlink()  # incomplete, so it is made again
            assert embed(network, data, out) == 0
            assert before[path][1] == path.read_bytes()


def test_a_damaged_file_is_told_and_made_again(network, photos, tmp_path, capsys):
    out = tmp_path / "e.parquet"
    assert embed(network, photos, out) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:40] + bytes(400) + whole[440:])
    assert embed(network, photos, out) == 2
    assert "give --overwrite" in one_line(capsys)
    assert embed(network, photos, out, "--overwrite") == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("name", ["e.csv", "e.npy"])
def test_a_file_that_was_changed_after_a_kill_is_not_replaced(name, network, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / name
    assert embed(network, photos, out) == 0
    monkeypatch.setattr(module, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert embed(network, photos, out, "--overwrite") == 130
    monkeypatch.undo()
    out.write_bytes(out.read_bytes()[:-20] + b"1" * 20)
    mine = out.read_bytes()
    capsys.readouterr()
    for words in ((), ("--overwrite",)):
        assert embed(network, photos, out, *words) == 2
        assert f"{name} was changed after `sssd embed` wrote it, so it is kept" in one_line(capsys)
    assert out.read_bytes() == mine


def test_nothing_of_the_users_is_replaced(network, photos, tmp_path, capsys):
    np.save(tmp_path / "mine.npy", np.zeros(3))
    (tmp_path / "new.npy.json").write_text('{"mine": true}')
    write_parquet(tmp_path / "mine.parquet", [file_bytes(picture(1))])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, words in (
        ("mine.npy", "is not embeddings of `sssd embed`, so it is kept"),
        ("mine.parquet", "is not embeddings of `sssd embed`, so it is kept"),
        ("new.npy", "new.npy.json is not of `sssd embed`, so it is kept"),
    ):
        assert embed(network, photos, tmp_path / name, "--overwrite") == 2
        assert words in one_line(capsys)
    assert embed(network, photos, photos / "e.parquet") == 2
    assert "lies in --data" in one_line(capsys)
    assert embed(network, photos, tmp_path / "e.txt") == 2
    assert "must end in one of .parquet, .csv, .npy" in one_line(capsys)
    assert embed(network, photos, tmp_path / "e.npy", "--in_memory") == 2
    assert "--in_memory is of no use here" in one_line(capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert embed(network, photos, tmp_path / "e.npy") == 0
    assert embed(network, photos, tmp_path / "e.npy", "--exits", "1") == 2
    assert "already exists, of other settings or data (exits differ): give --overwrite" in one_line(capsys)
    (tmp_path / ".other.npy.parts").mkdir()
    (tmp_path / ".other.npy.parts" / "mine.txt").write_text("mine")
    assert embed(network, photos, tmp_path / "other.npy", "--overwrite") == 2
    assert "was not made by sssd-zoo" in one_line(capsys)


def test_a_damaged_record_of_a_file_is_named(network, photos, tmp_path, capsys):
    assert embed(network, photos, tmp_path / "e.csv") == 0
    (tmp_path / "e.csv.json").write_text("")
    before = contents(tmp_path)
    for words in ((), ("--overwrite",)):
        assert embed(network, photos, tmp_path / "e.csv", *words) == 2
        line = one_line(capsys)
        assert "e.csv.json as JSON" in line
        assert "writes there what made e.csv: restore it, or give another --out" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changed", ["e.npy", "e.npy.csv"])
def test_a_file_that_was_changed_since_is_not_replaced(changed, network, photos, tmp_path, capsys):
    out = tmp_path / "e.npy"
    assert embed(network, photos, out) == 0
    assert embed(network, photos, out, "--overwrite") == 0
    if changed == "e.npy":
        np.save(out, np.zeros((17, 4), np.float32))
    else:
        (tmp_path / changed).write_text("row,path,mine\n0,a,b\n")
        out.unlink()  # the table alone was kept
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert embed(network, photos, out, *(["--overwrite"] if changed == "e.npy" else [])) == 2
    assert f"{changed} was changed after `sssd embed` wrote it, so it is kept" in one_line(capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_a_kill_leaves_beside_the_table_goes(network, photos, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("e.npy", "e.npy.csv"):
        (tmp_path / f".{name}.sssd-tmp-{ended.pid}").write_text("half")
    assert embed(network, photos, tmp_path / "e.npy") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"e.npy", "e.npy.csv", "e.npy.json"}


def test_a_link_is_followed(network, photos, tmp_path, capsys):
    real, link = tmp_path / "v1.npy", tmp_path / "latest.npy"
    assert embed(network, photos, real) == 0
    before = real.stat().st_ino
    link.symlink_to(real)
    assert embed(network, photos, link, "--overwrite") == 0
    assert link.readlink() == real
    assert real.stat().st_ino != before
    names = {path.name for path in tmp_path.iterdir() if "latest" in path.name or "v1" in path.name}
    assert names == {"latest.npy", "v1.npy", "v1.npy.json", "v1.npy.csv"}
    for name, out in (("broken.npy", "broken.npy"), ("new.npy.json", "new.npy")):
        (tmp_path / name).symlink_to(tmp_path / "none")
        assert embed(network, photos, tmp_path / out) == 2
        assert name in one_line(capsys)
        assert (tmp_path / name).is_symlink()


def test_a_folder_that_is_yet_to_be_made_in_the_data_is_refused(network, photos, tmp_path, capsys):
    assert embed(network, photos, photos / "new" / "e.parquet") == 2
    assert "where it would be read as data" in one_line(capsys)
    assert not (photos / "new").exists()


def test_no_other_file_is_read_because_a_file_names_it(network, photos, tmp_path, capsys):
    assert embed(network, photos, tmp_path / "e.csv") == 0
    record = tmp_path / "e.csv.json"
    meta = json.loads(record.read_text())
    record.write_text(json.dumps({**meta, "sha256": {**meta["sha256"], "../../etc/hostname": "0"}}))
    assert EmbeddingFile(tmp_path / "e.csv").meta["count"] == 17
    record.write_text(json.dumps({**meta, "sha256": {"e.csv": "0"}}))
    with pytest.raises(UserError, match="its sha256 differs"):
        EmbeddingFile(tmp_path / "e.csv")


def test_an_exit_that_is_not_in_the_file(network, photos, tmp_path):
    assert embed(network, photos, tmp_path / "e.npy") == 0
    with pytest.raises(UserError, match="has no exit '9': give one of 4"):
        next(EmbeddingFile(tmp_path / "e.npy").chunks("9"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ünï.csv", "ünï.parquet", "ünï.npy"])
def test_names_in_a_locale_without_them(name, network, photos, tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["embed", network, "--data", photos, "--out", tmp_path / name, "--image_size", "32", *CPU]
    done = command("-m", "sssd_zoo.cli", *map(str, words), environment=environment)
    assert done.returncode == 0, done.stderr
    assert EmbeddingFile(tmp_path / name).meta["count"] == 17


@pytest.mark.long
def test_an_image_that_is_too_large_is_told_once_and_plainly(network, tmp_path):
    write(tmp_path / "photos" / "a.png", picture(0))
    Image.new("L", (9500, 9500)).save(tmp_path / "photos" / "b.png", compress_level=1)
    words = ["embed", network, "--data", tmp_path / "photos", "--out", tmp_path / "e.npy", *CPU]
    done = command("-m", "sssd_zoo.cli", *map(str, words))
    assert done.returncode == 0, done.stderr
    assert "9500 x 9500 pixels are more than --max_pixels" in done.stderr
    assert "Warning" not in done.stderr


def test_images_that_cannot_be_read(network, photos, tmp_path, capsys):
    assert embed(network, photos, tmp_path / "e.npy", "--max_corrupt", "4") == 2
    assert "5 images of photos (train) cannot be decoded, more than max_corrupt 4" in one_line(capsys)
    assert not (tmp_path / "e.npy").exists()
    # Parts of the first call are kept, and so is what it could not read.
    assert embed(network, photos, tmp_path / "e.npy", "--max_corrupt", "4") == 2
    assert "more than max_corrupt 4" in one_line(capsys)
    assert not (tmp_path / "e.npy").exists()
    none = tmp_path / "none"
    none.mkdir()
    (none / "a.png").write_text("not an image")
    assert embed(network, none, tmp_path / "none.npy") == 2
    assert "none of 1 images of none (train) can be decoded" in one_line(capsys)


def test_numbers_that_fp16_cannot_hold_and_damaged_files(network, photos, tmp_path, capsys, monkeypatch):
    parts = module.Parts(tmp_path / "parts", 4, 2)
    values = torch.tensor([[[1.0]], [[1e6]]])
    with pytest.raises(module.UserError, match="the embedding of image 3 exceeds fp16: give --dtype fp32"):
        parts.write(0, torch.tensor([2, 3]), values, [], "fp16")
    with pytest.raises(module.UserError, match="image 2 is no finite number"):
        parts.write(0, torch.tensor([2, 3]), values / 0 * values, [], "fp32")
    assert embed(network, photos, tmp_path / "e.npy") == 0
    array = np.load(tmp_path / "e.npy")
    np.save(tmp_path / "e.npy", array[::-1])
    with pytest.raises(module.UserError, match=r"e.npy is not as it was written"):
        EmbeddingFile(tmp_path / "e.npy")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_file(network, tmp_path):
    for number in range(1400):
        write(tmp_path / "photos" / f"{number:04}.png", picture(number, 8))
    words = [
        "-m",
        "sssd_zoo.cli",
        "embed",
        str(network),
        "--data",
        str(tmp_path / "photos"),
        "--image_size",
        "32",
        *CPU,
    ]
    words += ["--batch_size", "16", "--out"]
    assert command(*words, str(tmp_path / "whole.parquet")).returncode == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, *words, str(tmp_path / "killed.parquet")], cwd=ROOT, env=environment)
    parts = tmp_path / ".killed.parquet.parts"
    while not list(parts.glob("part-*.npz")):
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (parts / RUN_MARK).is_file()
    done = command(*words, str(tmp_path / "killed.parquet"))
    assert done.returncode == 0, done.stderr
    assert "resumed: 1 of 2 parts" in done.stdout
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(network, tmp_path):
    for number in range(2100):
        write(tmp_path / "photos" / f"{number:04}.png", picture(number, 8))
    (tmp_path / "photos" / "2050.png").write_text("not an image")
    words = [
        str(network),
        "--data",
        str(tmp_path / "photos"),
        "--image_size",
        "32",
        *CPU,
        "--batch_size",
        "16",
        "--out",
    ]
    assert command("eval/embed.py", *words, str(tmp_path / "one.npy")).returncode == 0
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "eval/embed.py"]
    done = command(*launch, *words, str(tmp_path / "two.npy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2,099 images") == 1
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert (tmp_path / "one.npy.csv").read_bytes() == (tmp_path / "two.npy.csv").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_images():
    done = command("eval/benchmark.py", "embed-memory", "--images", "24000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file_mib"] > 30
    assert found["peak_mib"] - found["peak_mib_of_a_hundredth"] < 60 + found["file_mib"] / 4


def test_arguments_of_the_library():
    args = EmbedArgs(model="m", data="d", out="e.npy")
    assert (args.exits, args.dtype, args.normalise, args.max_corrupt) == ("final", "fp32", False, 2**31 - 1)
