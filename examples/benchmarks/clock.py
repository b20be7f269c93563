"""Steps a second of training: a callback of a back-end, called after each step by hand as well."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["Clock", "settle"]


class Clock:
    """When the first steps, which are not counted, and the last one had ended.

    Args:
        skipped: Steps that are not counted, at least 1.
        steps: All steps.
        device: A GPU is waited for at these two.
        now: Seconds.
    """

    is_passive = True

    def __init__(
        self, skipped: int, steps: int, device: torch.device | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.skipped, self.steps, self.device, self.now = skipped, steps, device, now
        self.seen, self.begun, self.seconds = 0, 0.0, 0.0

    def __call__(self, *_: object) -> None:
        self.seen += 1
        if self.seen in (self.skipped, self.steps):
            settle(self.device)
            self.begun, self.seconds = self.now(), self.now() - self.begun

    @property
    def rate(self) -> float:
        """Steps a second."""
        return (self.steps - self.skipped) / self.seconds


def settle(device: torch.device | None) -> None:
    """Waits for a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
