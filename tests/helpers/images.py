"""Pictures and what holds them: files, parquet tables, and boxes in Pascal VOC's folders."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("disc", "square")


def picture(seed: int, width: int = 12, height: int | None = None) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height or width, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_parquet(path: Path, pictures: list[bytes], **columns) -> Path:
    """A parquet file as the Hub has them, with images in the column `image`."""
    features = {"image": datasets.Image()}
    data = {"image": [{"bytes": data, "path": None} for data in pictures], **columns}
    rows = datasets.Dataset.from_dict(data)
    rows = rows.cast(datasets.Features({**rows.features, **features}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.data.table, path)
    return path


def draw(number: int) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int], bool]]]:
    """An image of a size of its own with one or two rectangles, and its objects: name, xyxy, difficult."""
    random = np.random.default_rng(number)
    width, height = 60 + 6 * number, 90 - 5 * number
    pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
    objects = []
    for place in range(1 + number % 2):
        left, top = int(random.integers(0, 15)) + 30 * place, int(random.integers(0, 15))
        name = CLASSES[(number + place) % 2]
        pixels[top : top + 24, left : left + 20] = (230, 40, 40) if name == "disc" else (40, 60, 230)
        objects.append((name, (left, top, left + 20, top + 24), place == 1 and number == 3))
    return pixels, objects


def write_voc(root: Path, splits: dict[str, range]) -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, numbers in splits.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{number:06}  1\n" for number in numbers))
        for number in numbers:
            pixels, objects = draw(number)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{number:06}.jpg", quality=95)
            things = "".join(
                f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{left + 1}</xmin>"
                f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for name, (left, top, right, bottom), difficult in objects
            )
            (root / "Annotations" / f"{number:06}.xml").write_text(f"<annotation>{things}</annotation>")
    return root
