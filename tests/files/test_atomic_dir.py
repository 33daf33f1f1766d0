"""Folders that are there whole or not at all, and what of an older one they take the place of."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT
from helpers.disk import contents, files_up_to
from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, atomic_write_text, disk_errors
from sssd_zoo.files.run_folder import atomic_dir, kind_of, restore, tidy


def write(folder: Path, content: str) -> None:
    with atomic_dir(folder, "network") as temporary:
        (temporary / "config.json").write_text(content)
        (temporary / "model.safetensors").write_text(content)


def test_it_appears_when_the_block_ends_and_not_before(tmp_path):
    with atomic_dir(tmp_path / "a" / "network", "network") as temporary:
        (temporary / "config.json").write_text("{}")
        assert not (tmp_path / "a" / "network").exists()
    assert set(contents(tmp_path)) == {"a", "a/network", f"a/network/{RUN_MARK}", "a/network/config.json"}
    assert kind_of(tmp_path / "a" / "network") == "network"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True])
def test_a_block_that_fails_leaves_what_was_there(error, old, tmp_path):
    if old:
        write(tmp_path / "network", "old")
    before = contents(tmp_path)

    def fails() -> None:
        with atomic_dir(tmp_path / "network", "network") as temporary:
            (temporary / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        fails()
    assert contents(tmp_path) == before


def test_a_rename_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path / "network", "old")
    (tmp_path / "network" / "notes.txt").write_text("the user's")
    before, rename = contents(tmp_path), Path.rename

    def fails(path: Path, target: Path) -> Path:
        if ".sssd-tmp-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "network", "new")
    assert contents(tmp_path) == before


def test_a_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written(tmp_path):
    photo = tmp_path / "photos" / "a.jpg"
    with pytest.raises(UserError, match=f"cannot open {photo}: permission denied"), disk_errors(tmp_path / "out" / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(photo))
    with pytest.raises(UserError, match=r"cannot write .*: permission denied"), disk_errors(tmp_path / "out" / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the name is too long"):
        atomic_write_text(tmp_path / ("x" * 249), "")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    write(tmp_path / "network", "old")
    before = contents(tmp_path)
    with files_up_to(100), pytest.raises(UserError, match=r"cannot write .*larger than the file-size limit"):
        write(tmp_path / "network", "new" * 100)
    assert contents(tmp_path) == before


def test_files_of_the_kind_are_replaced_and_others_stay(tmp_path):
    folder = tmp_path / "network"

    def visible() -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.glob("[a-zA-Z]*")}

    write(folder, "old")
    (folder / "notes.txt").write_text("the user's")
    (folder / "README.md").write_text("the user's")
    write(folder, "new")
    kept = {"notes.txt": "the user's"}
    assert visible() == {"config.json": "new", "model.safetensors": "new", "README.md": "the user's", **kept}
    with atomic_dir(folder, "network") as temporary:
        (temporary / "model.safetensors").write_text("with a card")
        (temporary / "README.md").write_text("the card")
    assert visible() == {"model.safetensors": "with a card", "README.md": "the card", **kept}
    write(folder, "newer")
    assert visible() == {"config.json": "newer", "model.safetensors": "newer", **kept}, (
        "the card was of the old network"
    )


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_where_a_folder_is_to_be_written_stays(kind, tmp_path):
    def write_card(*names: str) -> None:
        with atomic_dir(tmp_path / "card", "card") as temporary:
            for name in names:
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text("of the card")

    write_card("README.md")
    place, elsewhere = tmp_path / "card" / "figures", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.png").write_text("mine")
    if kind == "link":
        place.symlink_to(elsewhere)
    else:
        place.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"figures is a {kind}, and a folder of that name is to be written: move it"):
        write_card("README.md", "figures/accuracy.png")
    assert contents(tmp_path) == before


def test_a_folder_of_the_user_s_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("a cat")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds cat\.jpg"), atomic_dir(tmp_path / "photos", "network"):
        pytest.fail("it was begun")
    assert contents(tmp_path) == before


def test_what_a_kill_leaves_goes_and_the_old_folder_stays(tmp_path):
    write(tmp_path / "network", "old")
    before = contents(tmp_path)
    code = (
        "import os, signal, sys\n"
        "from sssd_zoo.files.run_folder import atomic_dir\n"
        "with atomic_dir(sys.argv[1], 'network') as temporary:\n"
        "    (temporary / 'config.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "network")]
    killed = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the old folder, and half a new one"
    restore(tmp_path / "network")
    tidy(tmp_path)
    assert contents(tmp_path) == before
