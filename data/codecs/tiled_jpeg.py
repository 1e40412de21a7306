"""JPEGs that can be decoded in part: restart markers cut them into tiles, and a table says where each tile lies.

A restart marker (ITU-T T.81, sections B.2.1 and E.1.4) resets all that entropy-coded data depend on. So the tiles that
cover a crop, put behind a header with their own width and height, are a JPEG of their own, and decoding costs what the
crop needs and not what the image has. Decoded, it has exactly the pixels that the whole image would have there.

A tile is 16 pixels high and a whole number of blocks of 16 × 16 pixels wide (4:2:0). To everybody else the file is an
ordinary JPEG; the table is in an APP9 segment right behind its first two bytes.
"""

import io
import re
import struct

import numpy as np
from PIL import Image

BLOCK = 16  # pixels along a side of a block that is coded together (MCU) at 4:2:0
CONTEXT = 2  # pixels beyond a crop that its colours depend on: chroma is interpolated between neighbours

_IDENTIFIER = b"swintile\0"
_SOI, _APP9, _SOF0, _SOS, _EOI = b"\xff\xd8", b"\xff\xe9", 0xC0, 0xDA, 0xD9
# marker, length, identifier; width, height, blocks in a tile, where the frame header and the tiles begin
_HEAD = struct.Struct(f">2s2sH{len(_IDENTIFIER)}sHHHHI")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_MOST_TILES = (0xFFFF - (_HEAD.size - 4)) // 2


class TiledJpeg(bytes):
    """The bytes of a file that `encode` made."""

    @staticmethod
    def recognises(content: bytes) -> bool:
        start = _HEAD.size - struct.calcsize(">HHHHI") - len(_IDENTIFIER)
        return content[start : start + len(_IDENTIFIER)] == _IDENTIFIER

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return _HEAD.unpack_from(self)[4:6]

    def part(self, left: int, top: int, width: int, height: int) -> tuple[bytes, int, int]:
        """A smaller JPEG that holds the crop of `width` × `height` pixels at (`left`, `top`), which is in the image.

        Returns:
            its bytes, and the left and the top of the crop in it.
        """
        _, _, length, _, whole_width, whole_height, blocks, frame, scan = _HEAD.unpack_from(self)
        tile = blocks * BLOCK
        across = -(-whole_width // tile)
        x0, x1 = max(0, left - CONTEXT) // tile, min(whole_width - 1, left + width - 1 + CONTEXT) // tile + 1
        y0, y1 = max(0, top - CONTEXT) // BLOCK, min(whole_height - 1, top + height - 1 + CONTEXT) // BLOCK + 1

        # Each tile with the marker of two bytes behind it; tiles beside each other are beside each other in the file.
        table_end = 4 + length
        lengths = np.frombuffer(self, "<u2", (table_end - _HEAD.size) // 2, _HEAD.size).astype(np.int64) + 2
        ends = (scan + np.cumsum(lengths)).reshape(-1, across)[y0:y1]
        lengths = lengths.reshape(-1, across)[y0:y1, x0:x1]
        starts = (ends[:, x0] - lengths[:, 0]).tolist()
        header = bytearray(self[table_end:scan])
        frame -= table_end
        part_width, part_height = min(x1 * tile, whole_width) - x0 * tile, min(y1 * BLOCK, whole_height) - y0 * BLOCK
        struct.pack_into(">HH", header, frame + 5, part_height, part_width)
        rows = [self[start:end] for start, end in zip(starts, ends[:, x1 - 1].tolist(), strict=True)]
        joined = bytearray(b"".join([_SOI, header, *rows]))

        # Restart markers count 0 to 7 and again; the last one becomes the end of the image.
        markers = np.frombuffer(joined, np.uint8)
        places = len(_SOI) + len(header) - 1 + np.cumsum(lengths)
        markers[places] = 0xD0 + (np.arange(len(places)) & 7)
        markers[-1] = _EOI
        return bytes(joined), left - x0 * tile, top - y0 * BLOCK


def encode(picture: Image.Image, quality: int) -> bytes:
    """`picture` (RGB) as a JPEG in tiles of two blocks, or as near to that as its width can be divided.

    Raises:
        ValueError: more tiles than the table can hold; up to 2,048 × 2,048 pixels it always can.
    """
    blocks = -(-picture.width // BLOCK)
    tile = next((count for count in (2, 3, 4, 5, 6) if blocks % count == 0), 1)
    buffer = io.BytesIO()
    options = {"subsampling": "4:2:0", "optimize": True, "restart_marker_blocks": tile}
    picture.save(buffer, "JPEG", quality=quality, **options)
    plain = buffer.getvalue()
    frame, scan = _frame_and_scan(plain)
    ends = np.array([found.start() for found in _RESTART.finditer(plain, scan)] + [len(plain) - 2])
    lengths = np.diff(ends, prepend=scan - 2) - 2
    if len(lengths) > _MOST_TILES or lengths.max() > 0xFFFF:
        raise ValueError(f"a picture of {picture.width} × {picture.height} pixels has too many tiles for the table")
    if len(lengths) != blocks // tile * -(-picture.height // BLOCK):
        raise RuntimeError("Pillow has not set the restart markers that were asked for")
    table = lengths.astype("<u2").tobytes()
    added = _HEAD.size - len(_SOI) + len(table)
    length = _HEAD.size - 4 + len(table)
    head = _HEAD.pack(
        _SOI, _APP9, length, _IDENTIFIER, picture.width, picture.height, tile, frame + added, scan + added
    )
    return head + table + plain[len(_SOI) :]


def _frame_and_scan(jpeg: bytes) -> tuple[int, int]:
    """Where the frame header (SOF0) and the entropy-coded data behind the scan header of a baseline JPEG begin."""
    at, frame = len(_SOI), -1
    while True:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == _SOF0:
            frame = at
        at += 2 + length
        if marker == _SOS:
            return frame, at
