"""`sssd clean`: removes the checkpoints and caches of complete stages, which earlier versions and a flag keep."""

from pathlib import Path

from sssd_zoo.configs import CleanArgs
from sssd_zoo.errors import UserError
from sssd_zoo.files import read_json
from sssd_zoo.files.lock import LOCK, refuse_if_held
from sssd_zoo.files.run_folder import CHECKPOINTS, VIEW_CACHE, claim, kind_of, remove

RUNS = ("fit", "compare", "finetune", "training", "detector")
REMOVED = (*CHECKPOINTS, *VIEW_CACHE)


def complete_stages(run: Path) -> list[Path]:
    """The folders of a run's complete stages: by the records of stages, or of a single training by its network.

    A stage that is being made beside an older result, or that is to be resumed, is none.
    """
    last = {"training": "config.json", "detector": "detector.json"}.get(kind_of(run) or "")  # file that is written
    if last is not None:
        return [run] if (run / "model.safetensors").is_file() and (run / last).is_file() else []
    found = []
    for record in sorted(run.rglob("steps/*.json")):
        folder = record.parent.parent / record.stem
        if record.name.startswith(".") or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            content = read_json(record)
        except UserError:  # damaged: nobody knows whether the stage is complete
            continue
        begun_anew = (record.parent / f".{record.name.removesuffix('.json')}.new.json").exists()
        if isinstance(content, dict) and content.get("result") is not None and kind_of(folder) and not begun_anew:
            found.append(folder)
    return found


def removable(folder: Path) -> list[Path]:
    """What may go of a complete stage: files and folders of checkpoints and caches that are no links."""
    return [path for pattern in REMOVED for path in sorted(folder.glob(pattern)) if not path.is_symlink()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [below for below in path.rglob("*") if below.is_file()]
    return sum(file.lstat().st_size for file in files)


def clean(args: CleanArgs) -> None:
    """`sssd clean`.

    Raises:
        UserError: for a folder that is not a run, and one that a command is writing.
    """
    run = Path(args.run)
    kind = kind_of(run) if run.is_dir() else None
    if kind not in RUNS:
        raise UserError(
            f"{run} is not a run of this package: give the --out of sssd fit, compare, finetune or a training"
        )
    if args.dry_run:
        refuse_if_held(run / LOCK)
    else:
        claim(run, kind)
    freed = 0
    for stage in complete_stages(run):
        found = removable(stage)
        size = sum(map(size_of, found))
        if found:
            print(f"{stage}: {len(found)} checkpoints or caches, {size / 1e6:,.1f} MB")
        if not args.dry_run:
            remove(stage, tuple(str(path.relative_to(stage)) for path in found))
        freed += size
    print(f"{freed / 1e6:,.1f} MB {'would be freed' if args.dry_run else 'freed'} in {run}")
