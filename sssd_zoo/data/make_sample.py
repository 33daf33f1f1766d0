"""Creates the sample that is bundled with the package: 10,000 train and 2,000 test images of CIFAR-10.

    python -m sssd_zoo.data.make_sample FOLDER

FOLDER holds train.parquet and test.parquet of CIFAR-10 with the columns img (JPEG bytes) and label. The images are
drawn class by class with a fixed seed, kept in the source's order, and their JPEG bytes are copied unchanged: at 32
px most of a JPEG file is tables that are identical in all images, which zstd compresses away.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).with_name("sample")
ROWS = {"train": 10_000, "test": 2_000}
SEED = 20_240_101
MAX_BYTES = 5_000_000
# Pages as large as the column and zstd's highest level let the repeated JPEG tables cancel out.
PARQUET = {"compression": "zstd", "compression_level": 22, "use_dictionary": ["label"], "data_page_size": 2**24}
PROVENANCE = """# The sample `cifar10-sample`

- What: {train:,} train and {test:,} test images of CIFAR-10, 32x32, columns `img` (JPEG) and `label` (10 classes).
- Origin: CIFAR-10 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
  https://www.cs.toronto.edu/~kriz/cifar.html), from a JPEG copy (quality about 75) with the columns of the Hub's
  `uoft-cs/cifar10`. So it is not the lossless original, and accuracies come out a little under those on the original.
- Licence: CIFAR-10 was published without a licence, for research; it is a labelled subset of the 80 million tiny
  images, whose rights stay with the photographers. Cite the report above when you use it. The licence of this package
  covers the code, not these images.
- How: `python -m sssd_zoo.data.make_sample FOLDER`, seed {seed}. From each split the same number of images per class
  was drawn without replacement; they keep the source's order and their JPEG bytes unchanged (zstd parquet).

| file | rows | per class | bytes | sha256 |
| --- | --- | --- | --- | --- |
{files}

| source file | rows | sha256 |
| --- | --- | --- |
{sources}
"""


def draw(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `count` rows, equally many of each class, without replacement.

    Args:
        labels: int64 [N], the class of each row.
        count: how many rows, a multiple of the number of classes.
        rng: the random generator.

    Returns:
        int64 [count], row numbers in ascending order.
    """
    classes = np.unique(labels)
    per_class, rest = divmod(count, len(classes))
    if rest:
        raise ValueError(f"{count} rows cannot be divided equally among {len(classes)} classes")
    rows = [rng.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in classes]
    return np.sort(np.concatenate(rows))


def make(source: Path, target: Path) -> None:
    """Writes train.parquet, test.parquet and PROVENANCE.md to `target` from the same two files of `source`."""
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    files, sources, total = [], [], 0
    for split, count in ROWS.items():
        origin, path = source / f"{split}.parquet", target / f"{split}.parquet"
        table = pq.read_table(origin)
        kept = table.take(pa.array(draw(table["label"].to_numpy(), count, rng)))
        pq.write_table(kept, path, row_group_size=count, **PARQUET)
        size = path.stat().st_size
        total += size
        per_class = count // len(np.unique(kept["label"].to_numpy()))
        files.append(f"| {path.name} | {count:,} | {per_class:,} | {size:,} | {_sha256(path)} |")
        sources.append(f"| {origin.name} | {table.num_rows:,} | {_sha256(origin)} |")
    if total > MAX_BYTES:
        raise ValueError(f"the sample has {total:,} bytes, more than {MAX_BYTES:,}")
    text = PROVENANCE.format(**ROWS, seed=SEED, files="\n".join(files), sources="\n".join(sources))
    (target / "PROVENANCE.md").write_text(text)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Reads the command line and makes the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--target", type=Path, default=SAMPLE, help="where to write (default: the package's sample)")
    arguments = parser.parse_args()
    make(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
