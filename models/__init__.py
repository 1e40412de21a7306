"""The models. `build_model(config)` makes one; see `models/build.py`."""

from models.build import build_model

__all__ = ["build_model"]
