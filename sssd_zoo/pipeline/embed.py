"""`sssd embed`: the features of images as a file, with the path or row of each.

Images are read, run and written in parts of about a thousand, each a file in a hidden folder beside --out. A killed run
resumes from them, several processes share them, and at the end the main process joins them into the file, so that the
memory holds no more than a part. An image is decoded once, by the loader's workers while the network runs.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sssd_zoo.configs import DataConfig, EmbedArgs, RuntimeConfig
from sssd_zoo.data.images import Corrupt
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loading import ImageData, load_images
from sssd_zoo.distributed import barrier, on_main, print_main, rank, world_size
from sssd_zoo.distributed.hardware import resolve_precision, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plural
from sssd_zoo.evaluation.embeddings import (
    DTYPES,
    FORMATS,
    KIND,
    EmbeddingFile,
    LeftOut,
    Meta,
    Part,
    is_embeddings,
    read_meta,
    sidecars,
    write_embeddings,
)
from sssd_zoo.evaluation.features import run_network
from sssd_zoo.files import atomic_write_bytes, damage, disk_errors, read_json, recorded_sha256, write_json
from sssd_zoo.files.run_folder import check_replaceable, check_writable, claim, discard, remove, tidy
from sssd_zoo.models import MultiExit
from sssd_zoo.models.networks import config_for, load_encoder, weights_digest
from sssd_zoo.training.hardware import make_accelerator

PART = 1024  # images, about: what a kill can lose
RECORD, PARTS = "identity.json", "part-*.npz"  # in the folder of the parts
JOINED = "joined"  # in the record
NAMED = 10  # images that the last line names of those that could not be read


def load_exits(name: str, exits: str, size: int | None = None) -> tuple[Any, str, list[str]]:
    """The network that gives the embeddings.

    Args:
        name: run folder, or the name of any timm model.
        exits: '1' to '4', 'final' or 'all'; networks without exits have 'final' alone.
        size: side in pixels that images are resized to for it; by default its own input size.

    Returns:
        The network, with no more than the exits need; the digest of the whole network's weights without its
        classifiers; and the exits' names.

    Raises:
        UserError: if it has no such exit.
    """
    network = load_encoder(name, size)
    digest = weights_digest(network)
    own = str(network.output) if isinstance(network, MultiExit) else "final"
    if own != "ensemble":
        has = {"final": "4"}.get(own, own) if isinstance(network, MultiExit) else "final"
        if exits not in ("final", has):
            raise UserError(f"'{name}' has no exits to choose from: leave out --exits {exits}")
        return network, digest, [has]
    if exits == "all":
        return network, digest, ["1", "2", "3", "4"]
    exit_name = "4" if exits == "final" else exits
    return load_encoder(name, size, output=exit_name), digest, [exit_name]


def embed(args: EmbedArgs) -> None:
    """`sssd embed`."""
    tune_cpu()
    make_accelerator(RuntimeConfig(device=args.device))
    out = Path(args.out)
    if out.is_symlink() and out.exists():
        out = out.resolve()  # the file that is written, with what belongs beside it
    on_main(lambda: check_target(args, out))
    network, digest, exits = load_exits(args.model, args.exits, args.image_size)
    config = config_for(args.model, network, replace(DataConfig.of(args), in_memory=False))
    data = load_images(config, default_size=storage_default(input_spec(network).size), verify=False)
    identity = {
        "digest": digest,
        "exits": exits,
        "dtype": args.dtype,
        "normalised": args.normalise,
        "precision": resolve_precision(args.precision, args.device),
        "batch_size": args.batch_size,
        "image_size": input_spec(network).size,
        "storage_size": data.size,
        "split": data.split,
        "fingerprint": data.fingerprint,
        "max_pixels": config.max_pixels,
        **({} if data.pixels is None else data.pixels.identity),
    }
    named = {"data": data.name, "folder": folder_of(args.data, data), "paths": digest_of_paths(data)}
    parts = Parts(parts_of(out), len(data), args.batch_size)
    if on_main(lambda: done_before(args, out, {**identity, **named}, parts)):
        print_main(f"done before: {out}")
        return
    missing = on_main(lambda: parts.open(identity, overwrite=args.overwrite))
    compute(args, network, data, parts, missing[rank() :: world_size()])
    barrier()
    if rank() == 0:
        meta = join(args, data, parts, {**identity, **named}, out)
        parts.discard()
        print(describe(meta, out))
    barrier()


def check_target(args: EmbedArgs, out: Path) -> None:
    """Refuses a file that may not be written.

    Raises:
        UserError: that says why.
    """
    if args.in_memory:
        raise UserError("--in_memory is of no use here, where each image is decoded once: leave it out")
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in one of {', '.join(FORMATS)}, which says how it is written")
    for source in [args.data] if isinstance(args.data, str) else args.data:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--out {out} lies in --data {source}, where it would be read as data: give another place")
    for record in sidecars(out)[:1]:
        try:
            is_ours(record)
        except UserError as error:
            raise UserError(
                f"{error}; `sssd embed` writes there what made {out.name}: restore it, or give another --out"
            ) from error
    # One of the same settings and data stays as it is: see `done_before`.
    check_replaceable(out, True, "embeddings of `sssd embed`", is_embeddings)
    for path in sidecars(out):
        tidy(path)
    foreign = [path for path in sidecars(out) if os.path.lexists(path) and not is_ours(sidecars(out)[0])]
    if foreign:
        raise UserError(f"{foreign[0]} is not of `sssd embed`, so it is kept: give another --out")
    if not Parts.joined(parts_of(out)) and (changed := changed_since(out)):
        raise UserError(
            f"{changed} was changed after `sssd embed` wrote it, so it is kept: move it, or give another --out"
        )


def done_before(args: EmbedArgs, out: Path, identity: dict[str, Any], parts: "Parts") -> bool:
    """Whether the file is there, complete and of the same settings and data; then parts of it that are left go.

    Raises:
        UserError: if it is of others, or damaged, and `overwrite` is not given.
    """
    if args.overwrite or not out.exists() or parts.joined(parts.folder):
        return False
    meta: dict[str, Any] = {**read_meta(out)}
    changed = [name for name, value in identity.items() if meta.get(name) != value]
    if changed:
        raise UserError(
            f"{out} already exists, of other settings or data ({', '.join(changed)} differ): give --overwrite to "
            "replace it, or another --out"
        )
    check_left_out(meta["left_out"], args, str(meta["data"]))
    if not all(path.is_file() for path in sidecars(out)):
        return False
    try:
        rows = sum(len(chunk) for chunk in EmbeddingFile(out).chunks(meta["exits"][-1]))
    except UserError as error:
        raise UserError(f"{error}; give --overwrite") from error
    if rows != meta["count"]:
        raise UserError(f"{out} has {rows} of its {meta['count']} embeddings: give --overwrite to make it again")
    if parts.folder.is_dir():
        with disk_errors(parts.folder):
            check_writable(parts.folder, "embedding")
            claim(parts.folder, "embedding")
            left = parts.made_of(parts.folder)
            if left is None or left.items() <= identity.items():
                parts.discard()
    return True


def is_ours(record: Path) -> bool:
    """Whether a file of metadata is of `sssd embed`."""
    content = read_json(record) if record.is_file() else None
    return isinstance(content, dict) and content.get("kind") == KIND


def changed_since(out: Path) -> Path | None:
    """A file of embeddings in CSV or .npy, or one beside it, that is not as it was written; or None."""
    for record in sidecars(out)[:1]:
        if record.is_file():
            written = recorded_sha256(read_json(record), [path.name for path in (out, *sidecars(out)[1:])])
            for name, digest in written.items():
                if (out.parent / name).is_file() and damage(out.parent, {name: digest}):
                    return out.parent / name
    return None


def parts_of(out: Path) -> Path:
    """The folder of the parts of a file that is not complete yet."""
    return out.with_name(f".{out.name}.parts")


class Parts:
    """The parts of a file that is not complete yet: a folder of a file each.

    Args:
        folder: of the parts.
        count: N, images of the data set.
        batch_size: images of a forward pass; a part holds whole batches, so that every image is computed in the same
            company, whichever process does it and however often it was killed.
    """

    def __init__(self, folder: Path, count: int, batch_size: int) -> None:
        self.folder, self.count, self.batch_size = folder, count, batch_size
        self.size = math.ceil(PART / batch_size) * batch_size
        self.numbers = range(math.ceil(count / self.size))

    def open(self, identity: dict[str, Any], *, overwrite: bool) -> list[int]:
        """Claims the folder for this command; gives the numbers of the parts that are missing.

        Raises:
            UserError: if it holds parts that were made otherwise, and `overwrite` does not discard them.
        """
        with disk_errors(self.folder):
            check_writable(self.folder, "embedding")
            claim(self.folder, "embedding")
            before = self.made_of(self.folder)
            if before is None:  # then the parts may be of anything
                remove(self.folder, (PARTS,))
                before = identity
            changed = [name for name in identity if before.get(name) != identity[name]]
            if changed and not overwrite:
                raise UserError(
                    f"{self.folder} holds an unfinished embedding of other settings or data ({', '.join(changed)} "
                    "differ): give --overwrite to discard it, or another --out"
                )
            if changed:
                remove(self.folder, (PARTS,))
            kept = {JOINED: True} if JOINED in before else {}  # until the file is complete
            write_json(self.folder / RECORD, {**identity, **kept})
        missing = [number for number in self.numbers if not self.path(number).is_file()]
        if len(missing) < len(self.numbers):
            print(f"resumed: {len(self.numbers) - len(missing)} of {len(self.numbers)} parts were done before")
        return missing

    @staticmethod
    def made_of(folder: Path) -> dict[str, Any] | None:
        """The record of what the parts in a folder are of; None where it is missing or damaged."""
        try:
            record: dict[str, Any] = read_json(folder / RECORD, dict[str, Any])
        except UserError:
            return None
        return record

    @staticmethod
    def joined(folder: Path) -> bool:
        """Whether a command was killed while it joined these parts: it may have written one file and not the others."""
        return JOINED in (Parts.made_of(folder) or {})

    def note_joined(self) -> None:
        """Notes that the parts are being joined."""
        write_json(self.folder / RECORD, {**read_json(self.folder / RECORD), JOINED: True})

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:06}.npz"

    def batches(self, number: int) -> tuple[Tensor, ...]:
        """The positions of a part's batches, int64 [B] each."""
        first = number * self.size
        batches: tuple[Tensor, ...] = torch.arange(first, min(first + self.size, self.count)).split(self.batch_size)
        return batches

    def write(self, number: int, positions: Tensor, values: Tensor, corrupt: list[Corrupt], dtype: str) -> None:
        """Writes a part.

        Args:
            number: of the part.
            positions: int64 [n].
            values: float32 [n, E, D].
            corrupt: images of it that could not be read.
            dtype: of the file.

        Raises:
            UserError: if the disk is full, or an embedding is no finite number.
        """
        with np.errstate(over="ignore"):  # told below
            stored = values.numpy().astype(DTYPES[dtype])
        if not np.isfinite(stored).all():
            row = int(positions[~torch.from_numpy(np.isfinite(stored).all((1, 2)))][0])
            too_large = bool(values.isfinite().all())
            why = "exceeds fp16: give --dtype fp32" if too_large else "is no finite number: give --precision fp32"
            raise UserError(f"the embedding of image {row} {why}")
        file = io.BytesIO()
        np.savez(file, positions=positions.numpy(), values=stored, corrupt=np.array(json.dumps(corrupt)))
        atomic_write_bytes(self.path(number), file.getvalue())

    def read(self, number: int, *names: str) -> list[Any]:
        """Arrays of a part.

        Raises:
            UserError: if it cannot be read.
        """
        try:
            with np.load(self.path(number), allow_pickle=False) as file:
                return [file[name] for name in names]
        except MemoryError:
            raise
        except Exception as error:  # zip files can be damaged in many ways
            self.path(number).unlink(missing_ok=True)
            raise UserError(f"{self.path(number)} was damaged and is removed: run the command again") from error

    def discard(self) -> None:
        """Removes the folder, as the file is complete."""
        if before := self.made_of(self.folder):  # a kill in between leaves parts that are not to be joined again
            write_json(self.folder / RECORD, {name: value for name, value in before.items() if name != JOINED})
        discard(self.folder, "embedding")


def compute(args: EmbedArgs, network: Any, data: ImageData, parts: Parts, numbers: list[int]) -> None:
    """Computes and writes these parts; a thread writes one while the next is computed."""
    order = [batch for number in numbers for batch in parts.batches(number)]
    left, told = list(numbers), len(data.corrupt)
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        readable = (batch for batch in data.batches(order, leave_out=True) if len(batch[0]))
        total = sum(map(len, order)) if rank() == 0 else None
        batches = run_network(network, readable, args, total=total, ahead=True)
        for number, group in groupby(batches, key=lambda batch: int(batch[0][0]) // parts.size):
            positions, values = zip(*group, strict=True)
            if writing is not None:
                writing.result()
            # The loader is ahead, so some may be of the next part; `join` takes each once.
            corrupt = data.corrupt[told:]
            told += len(corrupt)
            features = torch.cat(values, 1).transpose(0, 1)
            if args.normalise:
                features = torch.nn.functional.normalize(features, dim=-1)
            writing = writer.submit(parts.write, number, torch.cat(positions), features, corrupt, args.dtype)
            left.remove(number)
        if writing is not None:
            writing.result()
    for number in left:  # none of its images can be read
        parts.write(number, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 1), data.corrupt[told:], args.dtype)


def join(args: EmbedArgs, data: ImageData, parts: Parts, identity: dict[str, Any], out: Path) -> Meta:
    """Joins the parts into the file; gives what it says of itself.

    Raises:
        UserError: if no image could be read, or too many could not.
    """
    corrupt: dict[Corrupt, None] = {}
    count, shape = 0, (0, 0, 0)
    for number in parts.numbers:
        positions, values, told = parts.read(number, "positions", "values", "corrupt")
        corrupt |= dict.fromkeys((name, reason) for name, reason in json.loads(str(told)))
        count += len(positions)
        shape = values.shape if len(positions) else shape
    left_out = [LeftOut(image=name, reason=reason) for name, reason in sorted(corrupt, key=lambda one: str(one[0]))]
    if not count:
        parts.discard()
        raise UserError(f"none of the {parts.count} images of {data.name} can be read ({described(left_out)})")
    check_left_out(left_out, args, data.name)
    meta: Meta = {
        "package": "sssd-zoo",
        "kind": KIND,
        "model": args.model,
        "digest": identity["digest"],
        "exits": identity["exits"],
        "dimension": shape[2],
        "dtype": args.dtype,
        "normalised": args.normalise,
        "precision": identity["precision"],
        "batch_size": args.batch_size,
        "image_size": identity["image_size"],
        "storage_size": data.size,
        "channels": data.channels,
        "bits": 8 if data.pixels is None else data.pixels.bits,
        "max_pixels": identity["max_pixels"],
        "data": identity["data"],
        "split": data.split,
        "folder": identity["folder"],
        "paths": identity["paths"],
        "fingerprint": data.fingerprint,
        "count": count,
        "left_out": left_out,
    }

    def rows() -> Iterator[Part]:
        for number in parts.numbers:
            positions, values = parts.read(number, "positions", "values")
            if len(positions):
                yield Part(data.rows[positions], data.paths(positions), values)

    parts.note_joined()
    write_embeddings(out, rows(), meta)
    return meta


def check_left_out(left_out: list[LeftOut], args: EmbedArgs, name: str) -> None:
    """Raises `UserError` if too many images could not be read: each process and each call has counted its own alone."""
    if len(left_out) > args.max_corrupt:
        raise UserError(
            f"{plural(len(left_out), 'image')} of {name} cannot be read, more than max_corrupt {args.max_corrupt} "
            f"({described(left_out)}): fix or remove them, or raise --max_corrupt to leave them out"
        )


def folder_of(source: str | list[str], data: ImageData) -> str | None:
    """The folder that the paths of images are relative to; None where they are whole, or no files."""
    are_files = data.paths(np.arange(1))[0] is not None
    return str(Path(source).absolute()) if are_files and isinstance(source, str) and Path(source).is_dir() else None


def digest_of_paths(data: ImageData) -> str:
    """Tells images of the same content in other places apart."""
    digest = hashlib.sha256()
    for positions in np.array_split(np.arange(len(data)), max(1, len(data) // PART)):
        digest.update(json.dumps(data.paths(positions)).encode())
    return digest.hexdigest()[:16]


def described(left_out: list[LeftOut]) -> str:
    """The first images that were left out, and why."""
    return listed([f"{one['image']}: {one['reason']}" for one in left_out], NAMED, "; ")


def describe(meta: Meta, out: Path) -> str:
    """What was written, in a line or two."""
    exits = f"exits {', '.join(meta['exits'])}" if len(meta["exits"]) > 1 else f"exit {meta['exits'][0]}"
    exits = "the pooled features" if meta["exits"] == ["final"] else exits
    images = f"{plural(meta['count'], 'image')} of {meta['data']} ({meta['split']})"
    line = f"{images}, {exits}, {meta['dimension']} numbers each: {out}"
    if meta["left_out"]:
        line += f"\nleft out, as they cannot be read: {len(meta['left_out']):,} ({described(meta['left_out'])})"
    return line
