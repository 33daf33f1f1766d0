"""Images in memory and on disk: corrupt ones, equal batches, and the order in which processes see them."""

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from helpers.commands import command
from helpers.data import everything, load
from helpers.images import file_bytes, picture, write, write_parquet
from helpers.processes import run_together
from sssd_zoo.configs import SettingsError
from sssd_zoo.data import images, loading
from sssd_zoo.data.loading import GlobalBatches, fits_in_memory, read_in_order
from sssd_zoo.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_size": 0}, "storage_size is 0;"),
        ({"max_corrupt": -1}, "max_corrupt is -1;"),
        ({"streaming": True}, "pretraining only"),
    ],
)
def test_options(classes, options, message):
    with pytest.raises((UserError, SettingsError), match=message):
        load(classes, **options)


class TestCorrupt:
    @pytest.fixture
    def broken(self, classes) -> Path:
        (classes / "dog" / "1.png").write_bytes(b"nonsense")
        (classes / "eel" / "0.png").write_bytes(file_bytes(picture(0))[:-100])
        (classes / "eel" / "gone.png").symlink_to(classes / "nowhere.png")
        return classes

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_over_the_limit(self, broken, in_memory):
        with pytest.raises(UserError) as error:
            load(broken, in_memory=in_memory, max_corrupt=2)
        message = str(error.value)
        assert message.startswith("3 images of classes (train) cannot be decoded, more than max_corrupt 2 (")
        for name in ("dog/1.png: it is not an image", "eel/0.png: ", "eel/gone.png: No such file"):
            assert name in message

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_skipped_counted_named(self, broken, in_memory, caplog):
        data = load(broken, in_memory=in_memory, max_corrupt=3)
        assert data.rows.tolist() == [0, 1, 2, 4, 6, 7, 8]  # 3, 5 and 9 are corrupt
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
        assert [Path(name).name for name, _ in data.corrupt] == ["1.png", "0.png", "gone.png"]
        assert "skipped 3 corrupt images of classes (train), 3 so far" in caplog.text
        assert str(broken / "dog" / "1.png") in caplog.text
        _, images = everything(data)
        np.testing.assert_array_equal(images[3], np.asarray(Image.open(broken / "dog" / "2.png")).transpose(2, 0, 1))

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_processes_find_what_threads_do(self, broken, workers, monkeypatch):
        threads = load(broken, max_corrupt=3, workers=workers)
        monkeypatch.setattr(loading, "IN_PROCESSES", 1)
        monkeypatch.setattr(loading, "MOST_SHARED", 4 * 3 * 8 * 8)  # four images at a time
        called = []
        run = loading.decode_in_processes
        monkeypatch.setattr(loading, "decode_in_processes", lambda *args: called.append(1) or run(*args))
        processes = load(broken, max_corrupt=3, workers=workers)
        assert called
        assert processes.corrupt == threads.corrupt
        assert processes.rows.tolist() == threads.rows.tolist()
        for one, other in zip(everything(processes), everything(threads), strict=True):
            assert torch.equal(one, other)

    def test_a_process_that_the_system_ends_is_told_in_a_line(self, classes, monkeypatch):
        monkeypatch.setattr(loading, "IN_PROCESSES", 1)
        monkeypatch.setattr(loading._Decoder, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(
            UserError, match="ended by the system, most likely for lack of memory: give fewer --workers"
        ):
            load(classes, workers=2)

    def test_a_full_memory_is_no_corrupt_image(self, classes, monkeypatch):
        def full(*_, **__):
            raise MemoryError

        monkeypatch.setattr(images, "opened", full)
        with pytest.raises(MemoryError):
            load(classes, max_corrupt=100)

    def test_images_with_one_reason_are_named_together(self, classes):
        for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
            (classes / name).write_bytes(b"nonsense")
        (classes / "dog" / "1.png").unlink()
        (classes / "dog" / "1.png").symlink_to(classes / "nowhere.png")
        with pytest.raises(UserError) as error:
            load(classes)
        said = str(error.value)
        first, second = (f"{classes / name}" for name in ("cat/0.png", "cat/1.png"))
        assert f"({first}, {second}, {classes / 'dog/0.png'}: it is not an image" in said
        assert f"; {classes / 'dog/1.png'}: No such file" in said
        assert said.count("it is not an image") == 1

    def test_rows_are_named_by_number(self, tmp_path):
        file = write_parquet(tmp_path / "my.parquet", [file_bytes(picture(0)), b"x", file_bytes(picture(1))])
        with pytest.raises(UserError, match=r"1 image .*\(row 1: it is not an image"):
            load(file)
        assert load(file, max_corrupt=1).corrupt == [
            (1, "it is not an image of a known format, or of pixels that Pillow does not read")
        ]

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_all_corrupt(self, tmp_path, in_memory):
        file = write_parquet(tmp_path / "my.parquet", [b"x", b"y"])
        with pytest.raises(UserError, match="none of 2 images"):
            load(file, in_memory=in_memory, max_corrupt=5)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_found_late(self, broken, workers, caplog):
        data = load(broken, in_memory=False, verify=False, max_corrupt=3)
        assert (len(data), data.corrupt) == (10, [])
        with caplog.at_level(logging.WARNING):
            index, images = everything(data, batch=5, workers=workers)
        assert images.shape == (10, 3, 12, 12)
        # Of the batches 0..4 and 5..9, 3 and then 5 and 9 are replaced by good ones beside them, and named.
        assert index.tolist() == [0, 1, 2, 0, 4, 6, 6, 7, 8, 7]
        assert torch.equal(images[3], images[0])
        assert len(data.corrupt) == 3
        assert caplog.text.count("skipped") == 2
        everything(data, batch=5, workers=workers)  # known now, and not counted again
        assert len(data.corrupt) == 3

    @pytest.mark.parametrize("workers", [0, 2])
    def test_found_late_and_over_the_limit(self, broken, workers):
        data = load(broken, in_memory=False, verify=False, max_corrupt=1)
        with pytest.raises(UserError, match=r"3 images .*more than max_corrupt 1 .*dog/1.png"):
            everything(data, batch=5, workers=workers)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_for_a_batch_of_corrupt_images_stands_the_first_good_one(self, classes, workers):
        for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
            (classes / name).write_bytes(b"nonsense")
        data = load(classes, in_memory=False, verify=False, max_corrupt=3)
        index, images = everything(data, batch=1, workers=workers)
        first = next(row for row, name in enumerate(data.paths()) if (classes / name).read_bytes() != b"nonsense")
        corrupt = {name for name, _ in data.corrupt}
        assert len(corrupt) == 3
        for row, (position, image) in enumerate(zip(index.tolist(), images, strict=True)):
            assert position == (first if str(classes / data.paths()[row]) in corrupt else row)
            assert torch.equal(image, data.gather(torch.tensor([position]))[0])
        assert torch.equal(data.gather(torch.tensor([0])), images[first : first + 1]), "as in batches"

    def test_a_batch_of_nothing_but_corrupt_images_is_an_error_where_all_are(self, tmp_path):
        file = write_parquet(tmp_path / "my.parquet", [b"x", b"y"])
        data = load(file, in_memory=False, verify=False, max_corrupt=5, storage_size=8)
        with pytest.raises(UserError, match="none of 2 images"):
            everything(data, batch=1)

    @pytest.mark.parametrize("channels", [None, 1])
    def test_the_check_counts_the_pixels_that_reading_decodes(self, tmp_path, channels):
        """A JPEG of 512 px is decoded at 512 px to store 200 px, though the check needs 64 px of it."""
        for name, side in (("large.jpg", 512), ("small.jpg", 100), ("whole.png", 512), ("cut.png", 60)):
            write(tmp_path / name, picture(1, side))
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-50])
        options = {"storage_size": 200, "max_pixels": 200_000, "max_corrupt": 3, "channels": channels}
        memory, disk = (load(tmp_path, in_memory=keep, **options) for keep in (True, False))
        assert memory.rows.tolist() == disk.rows.tolist() == [2]
        assert memory.corrupt == disk.corrupt
        assert "512 x 512 pixels are more than --max_pixels 200000" in dict(disk.corrupt)[str(tmp_path / "large.jpg")]
        index, images = everything(disk)
        assert index.tolist() == [0]
        assert torch.equal(images, everything(memory)[1])
        smaller = {**options, "storage_size": 100}  # the JPEG is decoded at 256 px, and passes
        memory, disk = (load(tmp_path, in_memory=keep, **smaller) for keep in (True, False))
        assert memory.rows.tolist() == disk.rows.tolist() == [1, 2]

    @pytest.mark.long
    def test_processes_count_theirs_together(self, broken, tmp_path):
        """Each reads a half of the images: 1 and 2 of them are corrupt."""
        code = f"""
import logging
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loaders import EpochLoader
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
for limit in (3, 2):
    options = dict(in_memory=False, max_corrupt=limit, workers=0)
    data = load_images(DataConfig(data={str(broken)!r}, **options), progress=False, verify=False)
    loader = EpochLoader(data, 10, seed=0)
    try:
        list(loader.epoch(0))
        print(limit, sorted(name.split("/")[-1] for name, _ in data.corrupt))
    except UserError as error:
        print(limit, error.told, str(error).split(" (")[0], "max_corrupt 2" in str(error))
"""
        (tmp_path / "meeting").mkdir()
        for rank, said in enumerate(run_together(code, tmp_path / "meeting")):
            good, bad = said.splitlines()
            assert good == "3 ['0.png', '1.png', 'gone.png']"
            assert bad == f"2 {rank == 1} 3 images of classes True"


class TestBackends:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_give_the_same_batches(self, classes, workers):
        memory, disk = load(classes), load(classes, in_memory=False)
        assert (memory.in_memory, disk.in_memory) == (True, False)
        order = [torch.tensor([3, 1]), torch.tensor([8, 8, 0])]
        for left, right in zip(memory.batches(order), disk.batches(order, workers=workers), strict=True):
            assert left[1].dtype == torch.uint8
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
        assert torch.equal(memory.gather(order[1]), disk.gather(order[1]))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_leave_the_global_random_numbers_alone(self, classes, workers):
        data = load(classes, in_memory=False)
        torch.manual_seed(0)
        everything(data, workers=workers)
        after = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(3))

    def test_too_large_for_memory(self, classes, monkeypatch):
        class Memory:
            available = 2 * 9 * 3 * 12 * 12 - 1

        monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
        assert not load(classes).in_memory
        Memory.available += 1
        assert load(classes).in_memory


class TestGlobalBatches:
    @pytest.mark.parametrize("world", [2, 4])
    def test_processes_share_what_one_would_see(self, world):
        one = GlobalBatches(50, 8, seed=3)
        parts = [GlobalBatches(50, 8, seed=3, rank=rank, world=world) for rank in range(world)]
        assert {loader.steps_per_epoch for loader in (one, *parts)} == {6}
        for epoch in range(2):
            batches = zip(*(part.epoch(epoch) for part in parts), strict=True)
            for whole, split in zip(one.epoch(epoch), batches, strict=True):
                assert {len(part) for part in split} == {8 // world}
                assert torch.equal(whole, torch.cat(split))

    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(seed: int, epoch: int) -> list[int]:
            return torch.cat(list(GlobalBatches(40, 8, seed).epoch(epoch))).tolist()

        assert order(0, 0) == order(0, 0)
        assert sorted(order(0, 0)) == list(range(40))
        assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16

    def test_start_resumes(self):
        batches = GlobalBatches(50, 8, seed=1)
        whole = list(batches.epoch(2))
        for start in (0, 3, 5, 6):
            rest = list(batches.epoch(2, start))
            assert len(rest) == 6 - start
            assert all(torch.equal(left, right) for left, right in zip(rest, whole[start:], strict=True))

    def test_global_random_numbers_are_left_alone(self):
        torch.manual_seed(0)
        list(GlobalBatches(50, 8, seed=1).epoch(0))
        after = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(3))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 9}, "larger than the data set, 8 images"),
            ({"batch_size": 7, "world": 2}, "multiple of the 2 processes"),
            ({"batch_size": 0}, "positive"),
        ],
    )
    def test_bad_sizes(self, options, message):
        with pytest.raises(UserError, match=message):
            GlobalBatches(8, seed=0, **options)


class TestMemory:
    @pytest.fixture
    def free(self, monkeypatch):
        """1,000 bytes are free on this machine."""
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
        return 1000

    @pytest.mark.parametrize(("processes", "most"), [(None, 500), ("1", 500), ("2", 250), ("3", 166)])
    def test_half_of_the_free_memory_is_shared_by_the_processes(self, processes, most, free, monkeypatch):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert fits_in_memory(0)
        assert fits_in_memory(most)
        assert not fits_in_memory(most + 1)

    @pytest.mark.long
    def test_all_processes_do_as_the_first(self, tmp_path):
        """Each asks for another size, of which only the first fits."""
        code = "from sssd_zoo.data.loading import fits_in_memory\nprint(fits_in_memory([1, 10**18][rank]))"
        assert run_together(code, tmp_path) == ["True\n", "True\n"]


class Mistaken(Dataset):
    def __getitem__(self, positions):
        raise UserError("DICOM needs the package pydicom: pip install it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_worker_finds_is_told_without_its_traceback(workers):
    with pytest.raises(UserError, match=r"^DICOM needs the package pydicom: pip install it$"):
        next(read_in_order(Mistaken(), [torch.arange(2)], workers))


class Killed(Dataset):
    """Its workers end as the system ends those for whose batches /dev/shm has no room."""

    def __getitem__(self, positions):
        os.kill(os.getpid(), signal.SIGBUS)


class Refused(Dataset):
    """Its workers are told so by torch, as on Linux."""

    def __getitem__(self, positions):
        def full(tensor):
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)"
            )

        torch.Tensor.share_memory_ = full  # in the worker, which is a process of its own
        return torch.from_numpy(positions), []


@pytest.mark.parametrize("dataset", [Killed, Refused])
def test_workers_without_shared_memory_are_one_line(dataset):
    said = r"not have enough shared memory \(/dev/shm\): give --workers 0, or .*--shm-size 8g"
    with pytest.raises(UserError, match=said):
        next(read_in_order(dataset(), [torch.arange(2)], 1))


def test_workers_are_gone_once_the_reading_has_ended(tmp_path):
    """However it ended; that of the garbage collector closes a pipe twice, and once another file in its place."""
    code = """
import gc, multiprocessing, multiprocessing.connection, threading, time, torch
from torch.utils.data import Dataset
from sssd_zoo.data.loading import read_in_order
from sssd_zoo.errors import UserError
class Mistaken(Dataset):
    def __getitem__(self, positions):
        if positions[0] == 2:
            raise UserError("a mistake")
        return torch.from_numpy(positions)
close = multiprocessing.connection.Connection._close
def slowly(self, *args):
    if "Feeder" in threading.current_thread().name:
        time.sleep(0.05)
    return close(self, *args)
multiprocessing.connection.Connection._close = slowly
threading.excepthook = lambda problem: print("in a thread:", repr(problem.exc_value))
gc.disable()
kept = []
def read(first, take):
    batches = read_in_order(Mistaken(), [torch.tensor([first])], 2)
    try:
        for _, batch in zip(range(take), batches):
            print(batch.tolist())
    except UserError as error:
        error.cycle = error
        print(error)
    kept.append(batches)
read(2, 1)
print("left", multiprocessing.active_children())
read(0, 2)
print("left", multiprocessing.active_children())
gc.collect()
time.sleep(0.3)
"""
    done = command("-c", code)
    assert done.stdout.splitlines() == ["a mistake", "left []", "[0]", "left []"], done.stderr


class Broken(Dataset):
    def __getitem__(self, positions):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_workers_stay_what_they_are(workers):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        next(read_in_order(Broken(), [torch.arange(2)], workers))
