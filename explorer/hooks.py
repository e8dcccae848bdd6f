"""Look inside a model, and change what it computes, with PyTorch's hooks.

activations = record(model, idx)                 the output of each module, by its name
with off(model, "blocks.0.attention.head 2"):    the model without this head
with replace(model, {"blocks.1": tensor}):       the model with this output of block 1
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from common import LanguageModel
from explorer.steps import describe, is_attention, is_norm

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Change = tuple[nn.Module, Callable]  # a module and its hook, called with module, inputs, output


@torch.no_grad()
def record(model: LanguageModel, idx: Tensor) -> dict[str, Tensor]:
    """Every module's output by its name, and the "logits"; the model must be on the CPU.

    Attention has two more: "NAME.weights", of shape (B, H, T, T), and with an output projection
    "NAME.heads", of shape (B, T, H*D): the head outputs, concatenated.
    """
    found, softmax = {}, SoftmaxOutputs()
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def keep(module: nn.Module, x: tuple, y: Tensor, name: str = name) -> None:
                found[name] = y
                if name.endswith("out_proj"):
                    found[f"{name.removesuffix('out_proj')}heads"] = x[0]
                if is_attention(module) and ".heads." not in name:
                    found[f"{name}.weights"] = softmax.weights(*y.shape[:2])

            stack.enter_context(module.register_forward_hook(keep))
        with softmax:
            model.eval()(idx)
    return found | {"logits": found.pop("")[0]}


@contextmanager
def off(model: LanguageModel, *parts: str) -> Iterator[None]:
    """Switch off parts, named as on the page of explore.py.

    A sublayer, a head or the position embedding gives zeros. Without "skips", a sublayer's output
    replaces the residual stream instead of being added to it; without "norms" and "rope", vectors
    pass unchanged.
    """
    if unknown := set(parts) - {*describe(model)[0]["parts"]}:
        raise ValueError(f"the model has no {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        for module, hook in (change for part in parts for change in changes(model, part)):
            stack.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def replace(model: LanguageModel, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Activation patching: modules return these outputs instead of their own."""
    with ExitStack() as stack:
        for name, output in outputs.items():
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(lambda *_, y=output: y))
        yield


def changes(model: LanguageModel, part: str) -> Iterator[Change]:
    """The modules whose output changes when a part is off, and how."""
    modules, (name, _, head) = dict(model.named_modules()), part.partition(".head ")
    if part == "skips":
        for name, module in modules.items():
            if re.fullmatch(r"blocks\.\d+\.(attention|feed_forward)", name):
                yield from without_skip(module, modules.get(f"{name}_norm"))
    elif part in ("norms", "rope"):
        for module in modules.values():
            if is_norm(module) if part == "norms" else type(module).__name__ == "RoPE":
                yield module, lambda _, x, y: x[0]
    elif not head or not hasattr(modules[name], "out_proj"):
        yield modules[name], lambda _, x, y: torch.zeros_like(y)
    else:
        attention, projection = modules[name], modules[name].out_proj
        D = projection.in_features // (getattr(attention, "n_head", 0) or len(attention.heads))
        own = slice(int(head) * D, (int(head) + 1) * D)
        yield projection, lambda _, x, y: y - x[0][..., own] @ projection.weight[:, own].t()


def without_skip(sublayer: nn.Module, norm: nn.Module | None) -> Iterator[Change]:
    """Subtract x from the output of a sublayer, so that x + output leaves only the output."""
    last: list[Tensor] = [torch.empty(0)] * 2  # what the norm got and returned
    if norm is not None:
        yield norm, lambda _, x, y: last.__setitem__(slice(2), (x[0], y))
    yield sublayer, lambda _, x, y: y - (last[0] if last[1] is x[0] else x[0])


class SoftmaxOutputs(TorchFunctionMode):
    """Collects what softmax returns."""

    outputs: tuple[Tensor, ...] = ()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        self.outputs += (output,) * (function is F.softmax)
        return output

    def weights(self, B: int, T: int) -> Tensor:
        """Those since the last call: of all heads, of each head, or of chunks of the queries."""
        outputs = [F.pad(each, (0, T - each.shape[-1])) for each in self.outputs]
        self.outputs = ()
        if len(outputs) > 1 and outputs[0].shape[-2] == T:
            return torch.stack(outputs, dim=1)
        return torch.cat(outputs, dim=-2).view(B, -1, T, T)
