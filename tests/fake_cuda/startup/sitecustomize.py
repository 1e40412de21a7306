"""Python runs this at its start where `startup/` is on PYTHONPATH, and so in every process of a run on the stand-in.

Nothing is computed there, so the self-test of the attention kernels would call them wrong and choose other code, and a
save would find values that are not finite. Both checks are made to pass. cuDNN, which the stand-in does not have, is
switched off.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def _accept_triton_kernels(module: ModuleType) -> None:
    module.self_test = lambda *_: ""


def _accept_all_values(module: ModuleType) -> None:
    module.not_finite = lambda contents: None


def _without_cudnn(module: ModuleType) -> None:
    module.enabled = False


CHANGES = {
    "models.ops.triton_check": _accept_triton_kernels,
    "utils.checkpoint.io": _accept_all_values,
    "torch.backends.cudnn": _without_cudnn,
}


class Loader(importlib.abc.Loader):
    """Loads a module as usual and then changes it."""

    def __init__(self, usual: importlib.abc.Loader):
        self.usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.usual.exec_module(module)
        CHANGES[module.__name__](sys.modules[module.__name__])  # torch.backends.cudnn replaces itself there


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `CHANGES`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
