"""Images of many channels and bits: PNG of 16-bit colours, and DICOM files."""

import struct
import zlib
from pathlib import Path

import numpy as np


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, C], which Pillow itself cannot write for C above 1."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def write_dicom(path: Path, values: np.ndarray, *, bits: int = 12, **fields) -> Path:
    """A DICOM file of stored values [H, W] or [frames, H, W]; `fields` are set as they are."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = values.shape[-2:]
    defaults = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0}
    defaults |= {"BitsAllocated": 16 if bits > 8 else 8, "BitsStored": bits, "HighBit": bits - 1}
    if values.ndim == 3:
        defaults["NumberOfFrames"] = len(values)
    for name, value in {**defaults, **fields}.items():
        setattr(file, name, value)
    signed = file.PixelRepresentation == 1
    file.PixelData = values.astype(("int" if signed else "uint") + ("16" if bits > 8 else "8")).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path
