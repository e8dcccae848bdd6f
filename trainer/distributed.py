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
        self.is_main = self.rank == 0  # the main process prints and writes
        if self.size > 1 and not dist.is_initialized():
            # Imported later, this would keep threads alive after the process group ends.
            import torch.distributed.nn.functional  # noqa: F401

            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
            atexit.register(dist.destroy_process_group)  # its threads must end before Python does

    def broadcast(self, value: Any) -> Any:
        """Send the main process's value to all processes."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` in the main process; all processes get its result, or raise its error."""
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

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set in any process."""
        sums = self.all_reduce(torch.tensor(flags).float()) if self.size > 1 else flags
        return [each > 0 for each in sums]

    def average_gradients(self, model: nn.Module) -> None:
        """Average the gradients over all processes, in one message."""
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        if self.size > 1:
            sums = self.all_reduce(nn.utils.parameters_to_vector(gradients))
            nn.utils.vector_to_parameters(sums.div_(self.size), gradients)
