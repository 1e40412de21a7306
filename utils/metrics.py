"""Sums that stay on the device until somebody reads them."""

import torch

from utils.distributed.process_group import sum_across


class Sums:
    """Named running sums in float64 on `device`. Adding queues work and waits for nothing; reading waits once."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds 0-dim tensors, one for each name."""
        self._sums += torch.stack([values[name].detach().double() for name in self.names])

    def take(self) -> dict[str, float]:
        """The sums over all processes since the last call; a collective call."""
        total = sum_across(self._sums).tolist()
        self._sums.zero_()
        return dict(zip(self.names, total, strict=True))
