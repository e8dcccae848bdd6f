"""What a model computes, as a list of steps that the page repeats in JavaScript.

The steps are recorded while the model runs: PyTorch reports each function that it calls. Attention
and RMSNorm become one step each, which is compared with what the module returned.
"""

import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from trainer import UserError
from common import LanguageModel
from trainer.layers import EPS

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BINARY = {"add", "radd", "sub", "mul", "rmul"}
UNARY = {"relu", "silu", "gelu", "sigmoid", "tanh", "square"}
UNCHANGED = {"dropout", "contiguous", "to", "float", "clone"}  # these return their input
LAYERS = {"linear", "attention"}  # what a sublayer consists of
LINES = {"projection": "linear", "weights": "softmax", "heads": "last matmul", "out": "last linear"}


def describe(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The steps of a model, its parts that can be switched off, and the tensors they use."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = model(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
    recorder = Recorder(model)
    recorder.run(torch.randint(vocab_size, (1, min(8, model.block_size)), generator=generator))
    steps = recorder.steps
    mark_skips(steps)
    found = {name: module for name, module in model.named_modules() if name in recorder.output_of}
    sublayers = [name for name, module in found.items() if is_sublayer(module)]
    for name in (*sublayers, *({"position_embedding"} & found.keys())):
        steps[recorder.output_of[name]]["part"] = name
    about = {"steps": steps, "parts": parts(steps), "slides": model.slides}
    about |= {"blockSize": model.block_size, "layers": lens(recorder, sublayers)}
    return about, recorder.tensors


def is_attention(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("qkv_proj", "query", "heads"))


def is_rms_norm(module: nn.Module | None) -> bool:
    return type(module).__name__ == "RMSNorm" and not isinstance(module, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or is_rms_norm(module)


def is_sublayer(module: nn.Module) -> bool:
    """Attention, or an MLP: a module that has only linear layers below it, and at least two."""
    children = list(module.children())
    linear = [each for each in children if isinstance(each, nn.Linear)]
    return is_attention(module) or (len(linear) > 1 and all(not [*c.children()] for c in children))


def parts(steps: list[dict[str, Any]]) -> list[str]:
    """The names of all parts that can be switched off, in the order of the model."""
    names = []
    for step in steps:
        if step["kind"] == "attention":
            names += [f"{step['module']}.head {h}" for h in range(step["heads"])]
        names += [step["part"]] if "part" in step else []
    if any(step.get("frequencies") for step in steps):
        names.append("rope")
    if any("skip" in step for step in steps):
        names.append("skips")
    if any(step["kind"].endswith("norm") for step in steps):
        names.append("norms")
    return names


def lens(recorder: "Recorder", sublayers: list[str]) -> list[dict[str, Any]]:
    """Where the logit lens looks: what goes into the first sublayer, and each block's output."""
    blocks = [name for name in recorder.output_of if re.fullmatch(r"blocks\.\d+", name)]
    names = sorted(blocks or sublayers, key=recorder.output_of.get)
    if not names:
        return []
    first = next(step for step in recorder.steps if step["module"].startswith(names[0]))
    points = [{"name": "embedding", "step": next(iter(steps_used(first)))}]
    return points + [{"name": name, "step": recorder.output_of[name]} for name in names]


def steps_used(step: dict[str, Any]) -> dict[int, str]:
    """The steps whose outputs are a step's inputs, with the input's name."""
    return {step[n]["step"]: n for n in ("x", "a", "b") if "step" in step.get(n, {})}


def mark_skips(steps: list[dict[str, Any]]) -> None:
    """Find the skip connections: sums of x and what a sublayer computes from x."""
    layers_from: list[dict[int, bool]] = []  # for each step: what it uses, and through a layer?
    for i, step in enumerate(steps):
        inputs = steps_used(step)
        if step["kind"] == "add":
            for skip, name in inputs.items():
                if any(layers_from[other].get(skip) for other in inputs):
                    step["skip"] = name
        uses = {i: False}
        for each in inputs:
            for earlier, through in layers_from[each].items():
                uses[earlier] = uses.get(earlier, False) or through or step["kind"] in LAYERS
        layers_from.append(uses)


class Recorder(TorchFunctionMode):
    """Collects the steps of a model, and the tensors that they use."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.file = model, sys.modules[type(model).__module__].__file__
        self.names = {id(each): name for name, each in model.named_parameters()}
        self.steps: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.step_of: dict[int, int] = {}  # id of a tensor: the step that computed it
        self.output_of: dict[str, int] = {}  # name of a module: the step that computed its output
        self.kept: list[Tensor] = []  # alive, so that no id is used twice
        self.running: list[str] = []  # the names of the modules that are running
        self.whole: list[str] = []  # those that are a single step, and what is in them
        self.lines: dict[str, int] = {}  # line number of each function called inside one

    def run(self, idx: Tensor) -> None:
        self.idx, handles = idx, []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self.enter(name)))
            handles.append(module.register_forward_hook(self.leave(name)))
        try:
            with torch.no_grad(), self:
                self.model(idx)
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str) -> Callable:
        def hook(module: nn.Module, _: Any) -> None:
            self.running.append(name)
            if is_attention(module) or is_rms_norm(module):
                self.lines = self.lines if self.whole else {}
                self.whole.append(name)

        return hook

    def leave(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if self.whole == [name]:
                step = self.attention if is_attention(module) else self.rms_norm
                step(module, inputs[0], output)
            self.whole = [each for each in self.whole if each != name]
            if id(output) in self.step_of:
                self.output_of[name] = self.step_of[id(output)]
            self.running.pop()

        return hook

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.__name__.strip("_")
        if self.whole:
            self.lines.setdefault(name, self.line())
            self.lines[f"last {name}"] = self.line()
        elif torch.is_tensor(output):
            self.record(name, args, kwargs or {}, output)
        return output

    def record(self, name: str, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """Add a step for a function that PyTorch has called."""
        x = self.operand(args[0]) if args else {}
        if name == "embedding":
            is_token, T = args[0] is self.idx, self.idx.shape[1]
            if not is_token and not torch.equal(args[0].flatten(), torch.arange(T)):
                self.refuse(name)
            self.add("token" if is_token else "position", output, table=self.tensor(args[1]))
        elif not any(id(each) in self.step_of for each in args if torch.is_tensor(each)):
            pass  # it has nothing to do with the text: positions, or a mask
        elif name in UNCHANGED:
            self.step_of[id(output)] = x["step"]
            self.kept.append(output)
        elif name == "linear":
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.add(name, output, x=x, weight=self.tensor(args[1]), bias=self.tensor(bias))
        elif name in ("layer_norm", "rms_norm"):
            scale = {each: self.tensor(kwargs.get(each)) for each in ("weight", "bias")}
            eps = kwargs.get("eps") or torch.finfo(torch.float32).eps
            self.add(name, output, x=x, eps=eps, **scale)
        elif name in BINARY:
            self.add(name.removeprefix("r"), output, a=x, b=self.operand(args[1]))
        elif name in UNARY or (name == "pow" and args[1] == 2):
            suffix = "_tanh" if kwargs.get("approximate") == "tanh" else ""
            self.add("square" if name == "pow" else name + suffix, output, x=x)
        elif name == "pad" and tuple(args[1]) == (0, 0, 1, -1):
            self.add("shift", output, x=x)
        else:
            self.refuse(name)

    def attention(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """One step for all heads, however the module stores them."""
        name, names = self.running[-1], ("query", "key", "value")
        heads = getattr(module, "heads", [module] if hasattr(module, "query") else [])
        if heads:
            each_weight = [torch.cat([getattr(h, n).weight for h in heads]) for n in names]
        else:
            each_weight = module.qkv_proj.weight.chunk(3)
        out, rope = getattr(module, "out_proj", None), getattr(module, "rope", None)
        lines = {key: self.lines.get(function) for key, function in LINES.items()}
        lines["scores"] = self.lines.get("baddbmm", self.lines.get("matmul"))
        weights = {
            n: self.tensor(w, f"{name}.{n}") for n, w in zip(names, each_weight, strict=True)
        }
        self.add(
            "attention",
            output,
            x=self.operand(x),
            heads=len(heads) or module.n_head,
            **weights,
            out=self.tensor(out and out.weight),
            out_bias=self.tensor(out and out.bias),
            norm_eps=EPS if is_rms_norm(getattr(module, "qk_norm", None)) else None,
            frequencies=rope.inv_freq.tolist() if rope else None,
            window=self.model.block_size if self.model.slides else None,
            lines=lines,
        )
        if not torch.allclose(attend(self.steps[-1], x, self.tensors), output, atol=1e-4):
            self.refuse(f"an attention in {name} that is not this course's")

    def rms_norm(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        self.add("rms_norm", output, x=self.operand(x), eps=EPS, weight=None, bias=None)
        if not torch.allclose(F.rms_norm(x, x.shape[-1:], eps=EPS), output, atol=1e-4):
            self.refuse(f"a norm in {self.running[-1]} that is not this course's")

    def add(self, kind: str, output: Tensor, **fields: Any) -> None:
        self.step_of[id(output)] = len(self.steps)
        self.kept.append(output)
        step = {"kind": kind, "module": self.running[-1], "width": output.shape[-1]}
        self.steps.append(step | {"line": self.line()} | fields)

    def operand(self, value: Any) -> dict[str, Any]:
        """An input of a step: the output of another, a tensor of the model, or a number."""
        if id(value) in self.step_of:
            return {"step": self.step_of[id(value)]}
        return {"tensor": self.tensor(value)} if torch.is_tensor(value) else {"number": value}

    def tensor(self, value: Tensor | None, name: str = "") -> str | None:
        if value is None:
            return None
        name = name or self.names.get(id(value)) or f"constant {id(value)}"
        if value.dtype.is_floating_point:
            self.tensors[name] = value.detach()
            self.kept.append(value)
        return name

    def line(self) -> int:
        """The line of the model's script that is running."""
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return frame.f_lineno if frame else 0

    def refuse(self, what: str) -> NoReturn:
        script = f"{type(self.model).__module__}.py"
        raise UserError(f"explore.py cannot show {script}: it uses {what} (line {self.line()})")


def attend(step: dict[str, Any], x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Attention computed from a step, to compare with what the model computes."""
    B, T, _ = x.shape
    heads = [
        (x @ tensors[step[n]].t()).view(B, T, step["heads"], -1) for n in ("query", "key", "value")
    ]
    query, key, value = (each.transpose(1, 2) for each in heads)  # (B, H, T, D) each
    if step["norm_eps"]:
        query, key = (F.rms_norm(y, y.shape[-1:], eps=step["norm_eps"]) for y in (query, key))
    if step["frequencies"]:
        angles = torch.arange(T)[:, None] * torch.tensor(step["frequencies"])  # (T, D/2)
        turn = torch.polar(torch.ones_like(angles), angles)
        halves = [torch.complex(*y.chunk(2, dim=-1)) * turn for y in (query, key)]
        query, key = (torch.cat((y.real, y.imag), dim=-1) for y in halves)
    x = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x.transpose(1, 2).reshape(B, T, -1)
    bias = tensors[step["out_bias"]] if step["out_bias"] else None
    return F.linear(x, tensors[step["out"]], bias) if step["out"] else x
