"""Several processes that train one model, started by torchrun; by default there is just one."""

import atexit
import os
from collections.abc import Callable
from typing import Any

from trainer.cli import UserError

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World:
    """This process and the others: its rank, how many there are, and how they exchange data."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
        self.rank = int(os.environ.get("RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0  # this one prints and writes
        if self.size > 1 and not dist.is_initialized():
            # Loaded later, this would keep the group's threads alive after its end.
            import torch.distributed.nn.functional  # noqa: F401

            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
            atexit.register(dist.destroy_process_group)  # its threads must end before Python does

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """The main process does the work; all get its result, or end with its error."""
        result = error = None
        if self.is_main:
            try:
                result = work()
            except Exception as exception:
                error = exception
        result, message = self.broadcast((result, error and f"{type(error).__name__}: {error}"))
        if error or message:
            raise error or UserError(message)
        return result

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def average_gradients(self, model: nn.Module, flags: list[bool]) -> list[bool]:
        """Average gradients over all processes; in the same message, tell each other the flags."""
        if self.size == 1:
            return flags
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        first = gradients[0].new_tensor(flags)
        message = self.all_reduce(torch.cat([first, *(each.flatten() for each in gradients)]))
        means = (message[len(flags) :] / self.size).split([each.numel() for each in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return (message[: len(flags)] > 0).tolist()
