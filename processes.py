"""Several processes that train one model together, as `torchrun` starts them.

In a program that runs by itself there is one process, the first, and all of this does nothing.
"""

import atexit
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common import UserError

COUNT = int(os.environ.get("WORLD_SIZE", 1))  # torchrun tells each process these
RANK = int(os.environ.get("RANK", 0))
COUNT_HERE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # the same, counted on this machine
FIRST = RANK == 0  # this one writes and prints, and the others keep quiet

talk = None  # the group in which they talk; gradients go through PyTorch's own


def meet() -> None:
    """Wait for the others, if there are any."""
    global talk
    if COUNT > 1:
        cards = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("nccl" if cards else "gloo")
        talk = dist.new_group(backend="gloo")
        atexit.register(leave)


def leave() -> None:
    """Wait until the threads that talk have ended: one that outlives Python ends in a crash."""
    global talk
    dist.destroy_process_group()
    talk = None


def own_device(device: torch.device) -> torch.device:
    """The graphics card of this process: the first for the first, and so on."""
    if COUNT > 1 and device.type == "mps":
        raise UserError("a Mac's graphics card trains in one process: start it without torchrun")
    if COUNT == 1 or device.type != "cuda":
        return device
    cards = torch.cuda.device_count()
    if cards < COUNT_HERE:
        raise UserError(
            f"this machine has {cards} graphics cards: start no more processes on it than that "
            "(--nproc_per_node), or add --device cpu"
        )
    device = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(device)
    return device


def of_the_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    box = [value]
    if COUNT > 1:
        dist.broadcast_object_list(box, group=talk)
    return box[0]


def first_does(work: Callable[[], Any]) -> Any:
    """The first process does it; all get the result, or the same error."""
    result, error = None, ""
    if FIRST:
        try:
            result = work()
        except UserError as refusal:
            error = str(refusal)
    result, error = of_the_first((result, error))
    if error:
        raise UserError(error)
    return result


def any_of(*wishes: bool) -> list[bool]:
    """Whether any process has the wish, for each."""
    return (total(torch.tensor(wishes, dtype=torch.float32)) > 0).tolist() if COUNT > 1 else wishes


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if COUNT > 1:
        dist.all_reduce(values, group=talk)
    return values


def mine(rows: Tensor) -> Tensor:
    """This process's share of a batch."""
    return rows.chunk(COUNT)[RANK]
