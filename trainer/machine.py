"""Hardware settings: they depend on the machine, not on timing, so runs are reproducible."""

import math
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from common import pick_device
from trainer.cli import UserError
from trainer.distributed import World

import torch
from torch import Tensor, nn

CACHE_ACTIVATIONS = 2**19  # B * T * C of a micro-batch that still fits in a CPU's cache
SMALL_STEP = 2**26  # parameters * tokens; in smaller steps, more threads cost more than they save
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class DeviceSettings:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute


@dataclass
class MachineSettings(DeviceSettings):
    precision: Precision = "auto"  # dtype of matrix products; auto: the fastest that trains well
    compile: bool | None = None  # whether to use torch.compile (default: on CUDA, with triton)
    grad_accumulation: int = 1  # minimum number of micro-batches per step; more need less memory


class Machine:
    """The device of a run, and the settings that suit it."""

    def __init__(self, settings: MachineSettings, device: torch.device, precision: str) -> None:
        name = precision if settings.precision == "auto" else settings.precision
        if name == "float16" and device.type != "cuda":
            raise UserError("--precision float16 needs a CUDA GPU; try --precision bfloat16")
        self.device = device
        self.dtype = fast_dtype(device) if name == "auto" else getattr(torch, name)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.compiled = bool(settings.compile)
        if settings.compile is None and device.type == "cuda" and find_spec("triton"):
            self.compiled = torch.cuda.get_device_capability(device) >= (7, 0)
        self.grad_accumulation = settings.grad_accumulation
        # In float16, small gradients would underflow: scale the loss up, then the gradients down.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()

    def eager(self) -> AbstractContextManager:
        """A context that runs a compiled model eagerly, since new shapes would recompile it."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def micro_batches(self, config: Any, world: World) -> int:
        """How many micro-batches to divide this process's rows of a batch into."""
        fitting = max(1, CACHE_ACTIVATIONS // (config.block_size * config.n_embd))
        rows = config.batch_size // world.size
        count = math.ceil(rows / fitting) if self.device.type == "cpu" else 1
        return min(rows, max(self.grad_accumulation, count))

    def threads(self, model: nn.Module, config: Any) -> int:
        """How many threads a training step should use."""
        work = sum(p.numel() for p in model.parameters()) * config.batch_size * config.block_size
        return 1 if work <= SMALL_STEP else torch.get_num_threads()

    def seed(self, value: int) -> None:
        """Seed the generator that dropout uses on this device."""
        where = {"cpu": torch.default_generator, "cuda": torch.cuda, "mps": torch.mps}
        where[self.device.type].manual_seed(value)

    def send(self, tokens: Tensor) -> Tensor:
        """Copy to the device; on CUDA asynchronously, from pinned memory."""
        on_cuda = self.device.type == "cuda"
        pinned = tokens.contiguous().pin_memory() if on_cuda else tokens
        return pinned.to(self.device, non_blocking=on_cuda)


def available_device(name: str, world: World | None = None) -> torch.device:
    """The named device; with several processes on GPUs, this one's own."""
    device, world = pick_device(name), world or World()
    if device.type not in ("cpu", pick_device().type):
        raise UserError(f"PyTorch finds no {name} device on this machine; try --device cpu")
    if world.size == 1 or device.type == "cpu":
        return device
    if (gpus := torch.cuda.device_count()) < world.local_size:
        raise UserError(f"{world.local_size} processes, but {gpus} CUDA GPUs: try --device cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype that this device multiplies fastest and that still trains well."""
    if device.type == "cuda":
        modern = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if modern else torch.float16
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32  # other x86 CPUs are slow at it


def seed_for(*parts: object) -> int:
    """Derive a seed from `parts`, so that the randomness of a step depends on nothing else."""
    return zlib.crc32(" ".join(map(str, parts)).encode("utf-8"))
