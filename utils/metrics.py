"""Sums that stay on the device until they are read."""

import torch

from utils.distributed.process_group import sum_across


class Sums:
    """Named running sums in float64 on `device`. `add` only queues work; `take` synchronizes once."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one 0-dim tensor for each name."""
        self._sums += torch.stack([values[name].detach().double() for name in self.names])

    def take(self) -> dict[str, float]:
        """Returns the sums over all ranks since the last call, and resets them. A collective call."""
        total = sum_across(self._sums).tolist()
        self._sums.zero_()
        return dict(zip(self.names, total, strict=True))
