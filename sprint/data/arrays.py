"""Arrays in .npy and .npz that strangers wrote: never unpickled, nor trusted to be as large as they say."""

import io
import lzma
import struct
import tokenize
import zipfile
import zlib

import numpy as np

from sprint.data.items import said

LARGEST_ARRAY = 2**28  # bytes, unpacked
# What zipfile raises on bytes that are damaged, and what all of this module does.
BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError)
BAD_ARRAY = (ValueError, KeyError, OSError, EOFError, *BAD_ZIP)
_BAD_HEADER = (SyntaxError, TypeError, OverflowError, RecursionError, MemoryError, tokenize.TokenError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type, from the start of an .npy. Raises ValueError."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"an .npy of version {version}")
    try:
        return _HEADERS[version](stream)
    except _BAD_HEADER as error:
        raise ValueError(f"a damaged header: {said(error)}") from error


def npy_array(content: bytes) -> np.ndarray:
    """The numbers in an .npy, in this machine's order of bytes. Raises ValueError."""
    stream = io.BytesIO(content)
    shape, fortran, dtype = npy_header(stream)
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"an array of {dtype}")
    expected, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(content) - stream.tell()
    if expected != found:
        raise ValueError(f"{found} bytes for an array {list(shape)} of {dtype}")
    array = np.frombuffer(stream.getbuffer(), dtype, offset=stream.tell())
    array = array.reshape(shape, order="F" if fortran else "C")
    return np.require(array, dtype.newbyteorder("="), ["C", "ALIGNED"])


def npz_member(archive: zipfile.ZipFile, name: str, largest: int = LARGEST_ARRAY) -> np.ndarray:
    """Array NAME of an .npz, of at most so many bytes. Raises one of `BAD_ARRAY`."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > largest:
        raise ValueError(f"{name} has {member.file_size} bytes")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA may ask for gigabytes
        raise ValueError(f"{name} is packed in a way that numpy never does")
    return npy_array(archive.read(member))
