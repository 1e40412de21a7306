"""JPEGs that can be decoded in part: restart markers divide them into tiles, and a table holds the tiles' lengths.

A restart marker (ITU-T T.81, sections B.2.1 and E.1.4) resets all state of the entropy coder. So the tiles that cover a
crop, after a header with their own width and height, are a JPEG of their own. Decoding it costs what the crop needs
instead of what the image needs, and gives exactly the pixels of the image there.

A tile is 16 pixels high and a whole number of blocks of 16 × 16 pixels wide (4:2:0). For other programs the file is an
ordinary JPEG; the table is in an APP9 segment directly after its first two bytes.
"""

import io
import re
import struct

import numpy as np
from PIL import Image

BLOCK = 16  # side, in pixels, of a block that is coded together (MCU) at 4:2:0
CONTEXT = 2  # pixels around a crop that its colours depend on: chroma is interpolated between neighbours
MIN_WIDTH = 8  # pixels: libjpeg does not interpolate the chroma of images of up to 4 columns

_IDENTIFIER = b"swintile\0"
_SOI, _APP9, _SOF0, _SOS, _EOI = b"\xff\xd8", b"\xff\xe9", 0xC0, 0xDA, 0xD9
# markers, length, identifier; width, height, blocks in a tile, offsets of the frame header and of the tiles
_HEADER = struct.Struct(f">2s2sH{len(_IDENTIFIER)}sHHHHI")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_MAX_BYTES_BEFORE_FRAME = 0xFFFF - _HEADER.size  # with the table, whose own length has two bytes as well


class TiledJpeg(bytes):
    """The bytes of a file written by `encode`. Those of a stranger are made by `checked`."""

    @staticmethod
    def recognises(content: bytes) -> bool:
        start = _HEADER.size - struct.calcsize(">HHHHI") - len(_IDENTIFIER)
        return content[start : start + len(_IDENTIFIER)] == _IDENTIFIER

    @classmethod
    def checked(cls, content: bytes) -> "TiledJpeg":
        """Returns `content`, which `recognises` accepts. Raises ValueError when header, table and image disagree."""
        if len(content) < _HEADER.size:
            raise ValueError("its header is cut off")
        _, _, length, _, width, height, blocks, frame, scan = _HEADER.unpack_from(content)
        if not width or not height or not blocks:
            raise ValueError(f"its size is {width} × {height} pixels, in tiles of {blocks} blocks")
        tiles = -(-width // (blocks * BLOCK)) * -(-height // BLOCK)
        if length != _HEADER.size - 4 + 2 * tiles:
            raise ValueError(f"the table has {length} bytes, and there are {tiles} tiles")
        if _frame_and_scan(content) != (frame, scan):
            raise ValueError("the image begins elsewhere")
        # precision, height, width, number of components; then id, sampling factors and table of each
        if content[frame + 4 : frame + 10] != struct.pack(">BHHB", 8, height, width, 3):
            raise ValueError(f"the image is not one of {width} × {height} pixels and three colours")
        if content[frame + 11 : frame + 18 : 3] != b"\x22\x11\x11":
            raise ValueError("the colours are not sampled 4:2:0")
        lengths = np.frombuffer(content, "<u2", tiles, _HEADER.size)
        if int(lengths.sum(dtype=np.int64)) + 2 * tiles != len(content) - scan:
            raise ValueError("the tiles are not as long as the table says")
        return cls(content)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return _HEADER.unpack_from(self)[4:6]

    def part(self, left: int, top: int, width: int, height: int) -> tuple[bytes, int, int]:
        """Cuts out a smaller JPEG that contains the crop of `width` × `height` pixels at (`left`, `top`).

        The crop must be inside the image.

        Returns:
            The bytes of the smaller JPEG, and the left and the top of the crop in it.
        """
        _, _, length, _, whole_width, whole_height, blocks, frame, scan = _HEADER.unpack_from(self)
        tile = blocks * BLOCK
        across = -(-whole_width // tile)
        x0, x1 = max(0, left - CONTEXT) // tile, min(whole_width - 1, left + width - 1 + CONTEXT) // tile + 1
        y0, y1 = max(0, top - CONTEXT) // BLOCK, min(whole_height - 1, top + height - 1 + CONTEXT) // BLOCK + 1

        if min(x1 * tile, whole_width) - x0 * tile < MIN_WIDTH:
            x0 = max(0, x0 - 1)

        # Lengths include the two bytes of the marker after each tile. The tiles of a row are contiguous in the file.
        table_end = 4 + length
        lengths = np.frombuffer(self, "<u2", (table_end - _HEADER.size) // 2, _HEADER.size).astype(np.int64) + 2
        ends = (scan + np.cumsum(lengths)).reshape(-1, across)[y0:y1]
        lengths = lengths.reshape(-1, across)[y0:y1, x0:x1]
        starts = (ends[:, x0] - lengths[:, 0]).tolist()
        header = bytearray(self[table_end:scan])
        frame -= table_end
        part_width, part_height = min(x1 * tile, whole_width) - x0 * tile, min(y1 * BLOCK, whole_height) - y0 * BLOCK
        struct.pack_into(">HH", header, frame + 5, part_height, part_width)
        rows = [self[start:end] for start, end in zip(starts, ends[:, x1 - 1].tolist(), strict=True)]
        joined = bytearray(b"".join([_SOI, header, *rows]))

        # Restart markers count from 0 to 7 in a cycle; the last one becomes the end of the image.
        markers = np.frombuffer(joined, np.uint8)
        positions = len(_SOI) + len(header) - 1 + np.cumsum(lengths)
        markers[positions] = 0xD0 + (np.arange(len(positions)) & 7)
        markers[-1] = _EOI
        return bytes(joined), left - x0 * tile, top - y0 * BLOCK


def encode(image: Image.Image, quality: int) -> bytes:
    """Encodes an RGB image as a JPEG with tiles of two blocks, or of the next number that divides its width.

    Raises:
        ValueError: there are more tiles than fit into the table. Images up to 2,048 × 2,048 pixels always fit.
    """
    blocks = -(-image.width // BLOCK)
    tile = next((count for count in (2, 3, 4, 5, 6) if blocks % count == 0), 1)
    buffer = io.BytesIO()
    options = {"subsampling": "4:2:0", "optimize": True, "restart_marker_blocks": tile}
    image.save(buffer, "JPEG", quality=quality, **options)
    encoded = buffer.getvalue()
    frame, scan = _frame_and_scan(encoded)
    ends = np.array([found.start() for found in _RESTART.finditer(encoded, scan)] + [len(encoded) - 2])
    lengths = np.diff(ends, prepend=scan - 2) - 2
    if len(lengths) > (_MAX_BYTES_BEFORE_FRAME - frame) // 2 or lengths.max() > 0xFFFF:
        raise ValueError(f"an image of {image.width} × {image.height} pixels has too many tiles for the table")
    if len(lengths) != blocks // tile * -(-image.height // BLOCK):
        raise RuntimeError("Pillow did not write the requested restart markers")
    table = lengths.astype("<u2").tobytes()
    added = _HEADER.size - len(_SOI) + len(table)
    length = _HEADER.size - 4 + len(table)
    header = _HEADER.pack(
        _SOI, _APP9, length, _IDENTIFIER, image.width, image.height, tile, frame + added, scan + added
    )
    return header + table + encoded[len(_SOI) :]


def _frame_and_scan(jpeg: bytes) -> tuple[int, int]:
    """Offsets of the frame header (SOF0, -1 for none) and of the entropy-coded data in a baseline JPEG.

    Raises:
        ValueError: its segments are cut off.
    """
    at, frame = len(_SOI), -1
    while at + 4 <= len(jpeg):
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == _SOF0:
            frame = at
        at += 2 + max(length, 2)  # a length below 2, in a damaged file, does not lead back
        if marker == _SOS:
            return frame, at
    raise ValueError("its header is cut off")
