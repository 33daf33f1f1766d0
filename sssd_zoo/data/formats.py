"""Image file formats: those that are read, and what to do about the others."""

import importlib
import importlib.util
import stat
from pathlib import Path

from PIL import Image

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of the placeholder for a file that was not pulled


class CorruptImageError(Exception):
    """An image that cannot be decoded; the text is the reason."""


def _endings(names: str) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names.split())


def _decodable() -> tuple[str, ...]:
    """The extensions that are read: those that Pillow always decodes, and those of installed plugins."""
    for module, register in (("pillow_heif", "register_heif_opener"), ("pillow_avif", None), ("pillow_jxl", None)):
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if register is not None:
            getattr(plugin, register)()
    always = "jpg jpeg jpe jfif png apng bmp dib gif tif tiff webp ppm pgm pbm pnm jp2 j2k jpx tga"
    known = Image.registered_extensions()
    return _endings(always) + tuple(
        ending for ending in _endings("avif heic heif hif jxl") if known.get(ending) in Image.OPEN
    )


TIFF, DICOM, ARRAYS, SHARDS = _endings("tif tiff"), _endings("dcm dicom dic"), _endings("npy"), _endings("tar")
EXTENSIONS = _decodable() + (DICOM if importlib.util.find_spec("pydicom") is not None else ())
_CONVERT = "convert them to PNG or JPEG"
UNREAD = {  # extensions of images and of image containers that are not read, and what to do about them
    **dict.fromkeys(_endings("heic heif hif"), "pip install pillow-heif"),
    **dict.fromkeys(_endings("avif"), "pip install -U pillow (11.3 or newer decodes them)"),
    **dict.fromkeys(_endings("jxl"), "pip install pillow-jxl-plugin"),
    **dict.fromkeys(
        _endings("dng raw cr2 cr3 crw nef nrw arw srf sr2 raf orf rw2 pef srw 3fr iiq x3f erf kdc mrw"),
        "camera RAW: convert them to TIFF or JPEG, for example with rawpy or darktable",
    ),
    **dict.fromkeys(ARRAYS, "arrays: give --channels, the number of their channels"),
    **dict.fromkeys(_endings("npz mat h5 hdf5"), "arrays: save them as .npy, PNG, or parquet with images"),
    **dict.fromkeys(DICOM, "DICOM: pip install pydicom"),
    **dict.fromkeys(_endings("nii mha mhd nrrd"), "medical images: convert them to DICOM, TIFF or .npy"),
    **dict.fromkeys(_endings("zip tgz gz 7z rar"), "unpack them"),
    **dict.fromkeys(
        _endings(
            "psd psb xcf svg svgz eps ps pdf ai exr hdr pfm dds ico icns cur pcx sgi rgb rgba bw ras im fits fit msp "
            "xbm xpm blp qoi j2c jpc jpf jxr wdp wmf emf fli flc pcd svs ndpi webm vips"
        ),
        _CONVERT,
    ),
}
for _ending in EXTENSIONS:
    UNREAD.pop(_ending, None)


def regular_file(path: Path) -> Path:
    """The path, if it is a regular file: reading a pipe or a device would not end.

    Raises:
        OSError: if it is something else, or does not exist.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path
