"""Images from disk to device: indexing, reading, decoding, transforms, order, batches.

`build.py` is the way in and the only file here that reads the configuration.
"""
