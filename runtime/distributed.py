"""This process among those that `accelerate launch` or `torchrun` started: sums, gathers, and the gradient.

Gradients are summed, not averaged: losses divide by counts over all processes, so the sum is the gradient of one
large batch whatever the number of processes.
"""

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

LONGEST_WAIT = timedelta(hours=6)
"""For the main process, which tokenises or samples alone; torch's own is minutes. Hangs are the watchdog's to tell."""


class World:
    """All processes of the run."""

    def __init__(self, *, precision: str = "fp32") -> None:
        """precision "bf16": `autocast()` computes in bfloat16; weights stay as they are."""
        # Without cpu=True accelerate overlooks torchrun on a CPU, and every process believes it is the only one.
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        )
        self.precision = precision
        self.rank = self.accelerator.process_index
        self.size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device

    def autocast(self) -> Any:
        """Context manager for forward passes."""
        # Not accelerate's own: its precision is fixed by the first run of a process, and a notebook has several.
        # No cache: a forward pass casts every weight once, and the copies would stay until its end, of all layers, also
        # where FSDP2 has let go of the weights.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        return self.accelerator.reduce(values.to(self.device), reduction="sum") if self.size > 1 else values

    def gather(self, items: list[Any]) -> list[Any]:
        """Everyone's lists end to end, in order of rank."""
        return list(gather_object(items)) if self.size > 1 else items

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up every process's gradients, in place. A parameter unused here (an expert nobody chose) counts zero."""
        if self.size == 1:
            return
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()
