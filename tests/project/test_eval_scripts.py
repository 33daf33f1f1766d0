"""Scripts of eval/ that are no command of `sssd`: their mistakes are one line, and nothing is overwritten."""

import pytest

from helpers.commands import command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("label_free.py", "--data", "x", "--features", "{0}/f", "--out", "{0}/o", "name"),
            "'name' is not NAME=NETWORK",
        ),
        (
            ("label_free.py", "--data", "x", "--features", "{0}/f", "--out", "{0}/o", "a=x", "a=y"),
            "two networks are called a",
        ),
        (("image_folder.py", "--data", "nothere", "--out", "{0}/o"), "nothere"),
        (("image_folder.py", "--data", "cifar10-sample", "--out", "{0}"), "exists: give a folder to create"),
    ],
)
@pytest.mark.long
def test_mistakes(words, message, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    script, *others = (word.format(tmp_path) for word in words)
    done = command(f"eval/{script}", *others)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "error: " in line
    assert message in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_images_as_files(tmp_path):
    words = ("--data", "cifar10-sample", "--split", "train[:3]", "--out", str(tmp_path / "images"))
    done = command("eval/image_folder.py", *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["00000.png", "00001.png", "00002.png"]
