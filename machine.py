"""What suits this machine: measured at the start of a run, not looked up in a list."""

import math
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PORTION = 2**19  # so many numbers in (B, T, C) still find room in a processor's cache


def product_speeds(device: torch.device, *formats: torch.dtype) -> list[float]:
    """How many floating-point operations a second a large matrix product reaches, in each."""
    size = {"cpu": 512, "mps": 4096}.get(device.type, 8192)
    generator = torch.Generator(device).manual_seed(1)
    matrix = torch.rand(size, size, generator=generator, device=device)
    matrices = [matrix.to(number_format) for number_format in formats]
    best = [math.inf for _ in formats]
    for _ in range(12):  # the first ones warm up; of the others one will have been undisturbed
        for i, matrix in enumerate(matrices):
            wait_for(device)
            began = time.perf_counter()
            matrix @ matrix
            wait_for(device)
            best[i] = min(best[i], time.perf_counter() - began)
    return [2 * size**3 / seconds for seconds in best]


def pick_number_format(device: torch.device) -> torch.dtype:
    """The format for matrix products that is fastest and still learns well."""
    if device.type == "cuda":
        modern = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if modern else torch.float16
    if device.type == "cpu":
        # Some processors multiply 16-bit numbers at twice the speed, others emulate them slowly.
        short, long = product_speeds(device, torch.bfloat16, torch.float32)
        return torch.bfloat16 if short > 1.3 * long else torch.float32
    return torch.float32


def portions_for(device: torch.device, rows: int, row_size: int, at_least: int) -> int:
    """How many equal portions of a batch's rows to learn from, one after the other."""
    limit = PORTION if device.type == "cpu" else rows * row_size
    counts = (count for count in range(at_least, rows + 1) if rows % count == 0)
    return next(count for count in counts if rows // count * row_size <= limit or count == rows)


def operations(model: nn.Module, idx: torch.Tensor) -> int:
    """Floating-point operations of the matrix products, forward and backward, as PyTorch counts."""
    # PyTorch's own attention hides its products from the counter unless it works step by step.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, loss = model(idx, idx)
        loss.backward()
    return counter.get_total_flops()


def wait_for(device: torch.device) -> None:
    """A graphics card works on while the program goes on; here the program waits for it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
