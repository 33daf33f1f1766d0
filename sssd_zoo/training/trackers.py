"""Experiment trackers, through Accelerate's own: all that the installed Accelerate has.

What a tracker keeps on this machine lies in the command's folder, unless its own variables (TRACKIO_DIR,
MLFLOW_TRACKING_URI, ...) say where. trackers.json in a training's folder holds the names by which a resumed training
continues its runs.
"""

import io
import json
import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, atomic_write_bytes, disk_errors, read_json, write_json
from sssd_zoo.files.run_folder import kind_of

PROJECT = "sssd-zoo"
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME", "swanlab": "SWANLAB_PROJ_NAME"}
PACKAGES = {"comet_ml": "comet-ml"}  # for pip, where it is called otherwise
ID_OF = {  # of trackers that name their runs themselves
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
    "aim": lambda tracker: tracker.tracker.hash,
    "clearml": lambda tracker: tracker.tracker.id,
}
FILE = "trackers.json"
COLUMNS = 8  # images in the picture of views, at most


def check_trackers(names: Sequence[str]) -> None:
    """Raises `UserError` for trackers that are not installed, or that the installed Accelerate does not know."""
    known, installed = {str(kind) for kind in LoggerType}, {str(kind) for kind in get_available_trackers()}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"this version of Accelerate has no tracker {', '.join(unknown)}: pip install --upgrade accelerate"
        )
    if missing := [name for name in dict.fromkeys(names) if name not in installed]:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"--trackers: {', '.join(missing)} {are} not installed: pip install {packages}")


class Trackers:
    """The trackers of one training, in its main process.

    One that fails while the network trains is left out from then on, with a warning: a server that is down should not
    end a training.

    Args:
        names: of trackers, as Accelerate has them.
        out: folder of the training.
        step: optimiser steps done, more than 0 in a resumed training.
        settings: of the training, numbers and texts.

    Raises:
        UserError: for a tracker that cannot begin, as without an account.
    """

    def __init__(self, names: Sequence[str], out: Path, step: int, settings: dict[str, Any]) -> None:
        self.trackers: list[GeneralTracker] = []
        self.out = out
        self.ids: dict[str, str] = read_ids(out) if step else {}
        for name in dict.fromkeys(names):
            is_new = name not in self.ids
            self.trackers.append(self._start(name, step))
            if is_new:
                self._store(self.trackers[-1], settings)
        if names:
            with disk_errors(out):
                write_json(out / FILE, self.ids)

    def _start(self, name: str, step: int) -> GeneralTracker:
        """Begins a run of one tracker, or goes on with that of the training's own earlier part."""
        home, run = place(self.out)
        options = options_of(name, self.out, home, run, step, self.ids)
        project = os.environ.get(PROJECT_VARIABLES.get(name, ""), PROJECT)
        if name == "tensorboard":  # Accelerate makes the folder of both: OUT/tensorboard
            project, home = "tensorboard", self.out
        folders = ProjectConfiguration(project_dir=str(home), logging_dir=str(home))
        # One each: `init_trackers` would start those of earlier calls again.
        accelerator = Accelerator(log_with=name, project_config=folders)
        try:
            accelerator.init_trackers(project, init_kwargs={name: options})
        except Exception as error:  # each has errors of its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"tracker {name} cannot start: {reason}") from error
        (tracker,) = accelerator.trackers
        if name in ID_OF:
            self.ids[name] = str(ID_OF[name](tracker))
        return tracker

    def _store(self, tracker: GeneralTracker, settings: dict[str, Any]) -> None:
        """Gives a new run its settings."""
        simple = {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
            for name, value in settings.items()
        }
        if tracker.name == "tensorboard":  # whose own would make a second run of them
            table = "".join(f"| {name} | {value} |\n" for name, value in simple.items())
            self._attempt(tracker, lambda: tracker.log({"settings": f"| setting | value |\n| --- | --- |\n{table}"}, 0))
        else:
            self._attempt(tracker, lambda: tracker.store_init_configuration(simple))

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers of a step."""
        for tracker in list(self.trackers):
            self._attempt(tracker, lambda tracker=tracker: tracker.log(values, step=step))

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Logs an image, uint8 [H, W, 3], and keeps it as NAME.png in the training's folder."""
        path = self.out / f"{name}.png"
        with disk_errors(path):
            atomic_write_bytes(path, png(image))
        for tracker in list(self.trackers):
            self._attempt(tracker, lambda tracker=tracker: send_image(tracker, path, image, step))

    def close(self) -> None:
        """Ends the runs; not by `Accelerator.end_training`, which would end the other processes' group, too."""
        for tracker in list(self.trackers):
            self._attempt(tracker, tracker.finish)
        self.trackers = []

    def _attempt(self, tracker: GeneralTracker, action: Any) -> None:
        try:
            action()
        except Exception as error:  # each has errors of its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"warning: tracker {tracker.name} failed and gets nothing more: {reason}", file=sys.stderr)
            self.trackers.remove(tracker)


def read_ids(out: Path) -> dict[str, str]:
    """The names of the runs of a training's earlier part; none where the file is missing or damaged."""
    with suppress(UserError, OSError):
        return dict(read_json(out / FILE, dict[str, str]))
    return {}


def place(out: Path) -> tuple[Path, str]:
    """Of a training's folder, that of the command that it is a step of, and what to call its run."""
    folder = out.resolve()
    for above in folder.parents[:3]:
        if (above / RUN_MARK).is_file() and kind_of(above) in ("fit", "compare", "finetune"):
            # A step that replaces an older one is made in '.NAME.new'.
            parts = [part.removeprefix(".").removesuffix(".new") for part in folder.relative_to(above).parts]
            return above, "-".join([above.name, *parts])
    return folder, folder.name


def options_of(name: str, out: Path, home: Path, run: str, step: int, ids: dict[str, str]) -> dict[str, Any]:
    """What a tracker's own function takes besides the project, so that it has a run of this name or continues it.

    Args:
        name: of the tracker.
        out: folder of the training.
        home: that of the command.
        run: name of the run.
        step: optimiser steps done.
        ids: of runs, by tracker: one is chosen and added where the tracker does not do that itself.
    """
    earlier = ids.get(name)
    if name not in ID_OF:
        ids.setdefault(name, uuid.uuid4().hex[:21] if name == "swanlab" else uuid.uuid4().hex)
    if name == "tensorboard":
        return {"purge_step": step + 1 if step else 0}  # also what a training killed before its first checkpoint left
    if name == "trackio":  # it reads its folder when it is imported
        os.environ.setdefault("TRACKIO_DIR", str(home / "trackio"))
        return {"name": run, "resume": "allow" if earlier else "never", "embed": False}
    if name == "wandb":
        return {"name": run, "id": ids[name], "resume": "allow", "dir": str(home)}
    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" not in os.environ:
            (home / "mlflow").mkdir(parents=True, exist_ok=True)
            import_module("mlflow").set_tracking_uri(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
            return {"run_name": run, "run_id": earlier, "logging_dir": (home / "mlflow" / "artifacts").as_uri()}
        return {"run_name": run, "run_id": earlier}
    if name == "comet_ml":
        named = {"experiment_key": ids[name], "mode": "get_or_create"}
        return {**named, "experiment_config": _comet_config(run, home)}
    if name == "aim":
        return {"run_hash": earlier}
    if name == "clearml":
        return {"task_name": run, **({"continue_last_task": earlier} if earlier else {})}
    if name == "dvclive":
        return {"dir": str(out / "dvclive"), "resume": bool(earlier), "save_dvc_exp": False}
    return {"experiment_name": run, "id": ids[name], "resume": "allow", "logdir": str(home / "swanlog")}


def _comet_config(run: str, home: Path) -> Any:
    return import_module("comet_ml").ExperimentConfig(name=run, offline_directory=str(home / "comet"))


def send_image(tracker: GeneralTracker, path: Path, image: NDArray[np.uint8], step: int) -> None:
    """Gives a tracker an image in the way that it takes images, Accelerate's where that has one.

    Args:
        tracker: a tracker.
        path: the image as a file.
        image: the same, uint8 [H, W, 3].
        step: optimiser steps done.
    """
    name = path.stem
    if tracker.name == "tensorboard":
        tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({name: [image]}, step=step)
    elif tracker.name == "aim":
        tracker.log_images({name: Image.fromarray(image)}, step=step)
    elif tracker.name == "clearml":
        tracker.log_images({name: image}, step=step)
    elif tracker.name == "mlflow":
        tracker.log_artifact(str(path))
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    elif tracker.name == "comet_ml":
        tracker.tracker.log_image(image, name=name, step=step)
    elif tracker.name == "dvclive":
        tracker.tracker.log_image(path.name, image)


def png(image: NDArray[np.uint8]) -> bytes:
    """Uint8 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def grid_of_views(batch: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8] | None:
    """What the network sees of the first images of a batch, one below another each view of an image.

    Args:
        batch: of `Task.views`.
        mean: that the views were normalised by.
        std: likewise.

    Returns:
        Uint8 [views * size, n * size, 3], for n = COLUMNS images or all of fewer; None where the views are not squares
        of one size, as in detection.
    """
    views = next((batch[name] for name in ("views", "images", "student") if name in batch), None)
    views = [views] if isinstance(views, Tensor) else views
    if not views or any(not isinstance(view, Tensor) or view.ndim != 4 for view in views):
        return None
    rows = []
    for view in views:
        images = view[:COLUMNS].detach().float().cpu()
        scale, shift = (images.new_tensor(values).view(1, -1, 1, 1) for values in (std, mean))
        images = (images * scale + shift).clamp(0, 1)
        shown = (
            images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        )  # of more channels, three
        rows.append((255 * shown).round().byte().permute(2, 0, 3, 1).flatten(1, 2))  # [size, columns * size, 3]
    grid: NDArray[np.uint8] = np.concatenate([row.numpy() for row in rows])
    return grid
