"""Several processes that train one model, started by torchrun; by default there is just one."""

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any

from trainer.cli import UserError

import torch
import torch.distributed as dist
from torch import Tensor


class World:
    """This process and the others: its rank, how many there are, and how they exchange data."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0  # this one prints and writes
        if self.size > 1 and not dist.is_initialized():
            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
            atexit.register(dist.destroy_process_group)  # its threads must end before Python does

    def device(self, device: torch.device) -> torch.device:
        """This process's own GPU, if the run is on GPUs."""
        if self.size > 1 and device.type == "mps":
            raise UserError("MPS trains in one process: start the script without torchrun")
        if self.size == 1 or device.type != "cuda":
            return device
        if torch.cuda.device_count() < self.local_size:
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs for {self.local_size} "
                "processes: set --nproc_per_node to that, or add --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

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
        result, message = self.broadcast((result, None if error is None else str(error)))
        if error is not None:
            raise error
        if message is not None:
            raise UserError(message)
        return result

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def shard(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return rows.chunk(self.size)[self.rank]

    def average_gradients(self, parameters: Iterable[Tensor], flags: list[bool]) -> list[bool]:
        """Average the gradients over all processes; return each flag if it is set in any of them.

        Both travel in one message, so that all processes know after each step whether to stop.
        """
        if self.size == 1:
            return flags
        gradients = [p.grad for p in parameters if p.grad is not None]
        signals = torch.tensor(flags, dtype=gradients[0].dtype, device=gradients[0].device)
        message = torch.cat([signals, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(message)
        sums = message[len(flags) :] / self.size
        pieces = sums.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        return (message[: len(flags)] > 0).tolist()
