"""What benchmarks measure besides time: FLOPs, and how many per second this machine can do."""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOPs per second of a large matrix product, the best of several."""
    size = {"cpu": 512, "mps": 4096}.get(device.type, 8192)
    matrix = torch.rand(size, size, device=device).to(dtype)
    seconds = math.inf
    for _ in range(12):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds = min(seconds, time.perf_counter() - began)
    return 2 * size**3 / seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, which computes while the program continues."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_flops(model: nn.Module, idx: Tensor) -> int:
    """FLOPs of the matrix products, forward and backward, as PyTorch counts them."""
    # PyTorch's fused attention hides its products from the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, loss = model(idx, idx)
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()
