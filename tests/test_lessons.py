"""The scripts keep their promises: imports are free, diffs are small, shape comments are true.

Nothing is trained here. The scripts are read as text and, for the shapes, run on one batch.
"""

import ast
import difflib
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, STAGES
from torch import Tensor

COMMANDS = ("prepare", "bpe", "sample", "compare", "explore", "export")
every_stage = pytest.mark.parametrize("stage", STAGES)


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def tracked(pattern: str) -> list[str]:
    """The project's own files, without those that a reader has added."""
    try:
        command = ["git", "-C", ROOT, "ls-files", pattern]
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        names = []
    return [name for name in names if (ROOT / name).exists()] or pytest.skip("this is no checkout")


# Importing is free.

IMPORT_AND_WATCH = """
import sys
import torch, tqdm  # what these do on import is their own affair

def watch(event, arguments):
    group = event.partition(".")[0]
    reads_code = event == "open" and str(arguments[0]).endswith((".py", ".pyc"))
    if group in ("open", "socket", "subprocess", "shutil") and not reads_code:
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(watch)
before = torch.get_rng_state()
for stage in sys.argv[1:]:
    __import__(stage)
assert torch.equal(torch.get_rng_state(), before), "a weight or a batch was sampled"
"""
RUN_UNTIL_TORCH = """
import os, sys

def watch(event, arguments):
    if event == "import" and arguments[0] == "torch":
        seen = {each: os.environ[each] for each in os.environ if "OMP_" in each}
        os.write(1, ascii(seen).encode())
        os._exit(0)

sys.addaudithook(watch)
exec(sys.argv[1])
"""


def python(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh Python prints that has the scripts on its path."""
    inherited = {each: os.environ[each] for each in os.environ if "OMP_" not in each}
    ours = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    options = {"cwd": cwd, "env": inherited | ours, "timeout": 120, "text": True}
    result = subprocess.run(command, capture_output=True, **options)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_importing_the_scripts_does_nothing_else(tmp_path):
    assert python(IMPORT_AND_WATCH, *STAGES, cwd=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def assert_threads_spin_briefly(code: str, cwd: Path = ROOT) -> None:
    seen = ast.literal_eval(python(RUN_UNTIL_TORCH, code, cwd=cwd))
    assert seen.keys() == {"GOMP_SPINCOUNT"}
    assert 0 < int(seen["GOMP_SPINCOUNT"]) < 100_000


@pytest.mark.parametrize("script", [*STAGES, *COMMANDS])
def test_threads_spin_briefly_because_trainer_is_imported_before_torch(script):
    assert_threads_spin_briefly(f"import {script}")


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}], ids=str)
def test_the_users_own_choice_of_spinning_is_left_alone(own):
    assert ast.literal_eval(python(RUN_UNTIL_TORCH, "import gpt", **own)) == own


@every_stage
def test_a_stage_imports_no_other_stage(stage):
    imported = set()
    for node in ast.walk(ast.parse(read(f"{stage}.py"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    roots = {name.partition(".")[0] for name in imported}
    assert roots - sys.stdlib_module_names == {"torch", "common", "trainer"}


# The diff is the lesson, and the code stays small.

BUDGETS = {  # code lines added and removed, at most
    "self_attention": (40, 8),
    "multihead_attention": (22, 4),
    "batched_attention": (32, 44),
    "feed_forward": (18, 6),
    "residual": (24, 6),
    "layer_norm": (18, 10),
    "gpt": (115, 45),
    "modern_gpt": (170, 80),
}


def code_lines(source: str) -> list[str]:
    """All lines that are neither blank nor part of a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [line for number, line in lines if line.strip() and number not in docstrings]


@pytest.mark.parametrize("before, after", list(itertools.pairwise(STAGES)))
def test_the_diff_is_the_lesson(before, after):
    sources = [code_lines(read(f"{stage}.py")) for stage in (before, after)]
    diff = list(difflib.unified_diff(*sources, before, after, n=0, lineterm=""))
    changes = [line[0] for line in diff[2:]]
    added, removed = changes.count("+"), changes.count("-")
    most_added, most_removed = BUDGETS[after]
    assert added <= most_added and removed <= most_removed, "\n".join(
        [f"+{added}/-{removed}, allowed are +{most_added}/-{most_removed}", *diff]
    )


SIZE_LIMITS = {"gpt.py": 220, "modern_gpt.py": 340, "common.py": 100}
SIZE_LIMITS |= {"trainer/*.py": 1530, "tests/*.py": 5862}
SIZE_LIMITS |= {"bpe.py": 150, "explore.py": 120}
SIZE_LIMITS |= {"explorer/hooks.py": 120, "explorer/model.js": 250}


@pytest.mark.parametrize("pattern, most", SIZE_LIMITS.items())
def test_files_stay_short(pattern, most):
    names = [name for name in tracked(pattern) if "mistakes" not in name]
    counts = {name: len(read(name).splitlines()) for name in names}
    assert sum(counts.values()) <= most, counts


def test_functions_and_classes_stay_small():
    for path in (ROOT / "trainer").glob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 40, f"{path.name}: {node.name} has {length} lines"
            elif isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                assert len(methods) <= 15, f"{path.name}: {node.name} has {len(methods)} methods"


def test_the_scripts_are_those_of_the_course():
    top = {name for name in tracked("*.py") if "/" not in name}
    assert top == {f"{name}.py" for name in (*STAGES, "common", *COMMANDS)}


# Shapes are true: every shape comment is compared with the tensor while the code runs.

# All differ, also from 3 and 4, which are in the comments as numbers, and from T + 1.
SIZES = {"B": 5, "T": 8, "C": 84, "H": 6, "D": 14, "V": 11}
CACHED = 4  # this many characters are in a cache: attention sees S = T + CACHED of them
BLOCK_SIZE = 13  # what T means where there is no text yet, in `__init__`
SHAPE_COMMENT = re.compile(r"# \(([^()a-z]+)\)(?: (each)\b)?")


def shape_comments(source: str) -> dict[int, re.Match]:
    """The comments such as `# (B, T, C)`, by their lines."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (comment := SHAPE_COMMENT.match(token.string)):
            found[token.start[0]] = comment
    return found


class ShapeWatch(ast.NodeTransformer):
    """Runs a script and looks at the values of its assignments, `return`s and loop variables.

    Where the line ends with a shape comment, the value must have that shape. In a `forward` a
    shape that no local tensor has yet must have such a comment.
    """

    def __init__(self, source: str) -> None:
        self.comments = shape_comments(source)
        self.checked = set()
        self.complaints = set()
        self.sizes = SIZES
        self.cached = 0
        self.function = ""  # the one that is being visited
        tree = ast.fix_missing_locations(self.visit(ast.parse(source)))
        self.script = {"__name__": "script", "__file__": __file__, "look_at": self.look_at}
        exec(compile(tree, "script", "exec"), self.script)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer
        return node

    def visit_For(self, node: ast.For) -> ast.stmt:
        """The loop variables are looked at first in each round."""
        self.generic_visit(node)
        if node.lineno in self.comments:
            look = f"look_at({ast.unparse(node.target)}, {node.lineno}, '', locals())"
            node.body.insert(0, ast.parse(look).body[0])
        return node

    def visit_value(self, node: ast.Assign | ast.AnnAssign | ast.Return) -> ast.stmt:
        """Make `x = value` into `x = look_at(value, ...)`, and `a, b = value` likewise."""
        line = node.end_lineno
        if node.value and (line in self.comments or self.function == "forward"):
            unpacked = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            value = f"tuple({ast.unparse(node.value)})" if unpacked else ast.unparse(node.value)
            look = f"look_at({value}, {line}, {self.function!r}, locals())"
            node.value = ast.parse(look, mode="eval").body
        return node

    visit_Assign = visit_AnnAssign = visit_Return = visit_value

    def look_at(self, value: object, line: int, function: str, variables: dict) -> object:
        sizes = self.sizes | ({"T": BLOCK_SIZE} if function == "__init__" else {})
        sizes["S"] = sizes["T"] + self.cached
        for letter in sizes.keys() & variables.keys():
            if variables[letter] != sizes[letter]:
                self.complain(line, f"{letter} is {variables[letter]} here")
        parts = value if isinstance(value, tuple) else (value,)
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        if line in self.comments:
            self.checked.add(line)
            self.compare(self.comments[line], shapes, line, sizes)
        else:
            known = [tuple(each.shape) for each in variables.values() if isinstance(each, Tensor)]
            for shape in shapes:
                if shape and shape not in known:  # a loss has the shape ()
                    self.complain(line, f"{shape} is new and has no comment")
        return value

    def compare(self, comment: re.Match, shapes: list, line: int, sizes: dict[str, int]) -> None:
        said, how_many = comment.groups()
        expected = eval(f"({said},)", {}, sizes)
        enough = {"each": len(shapes) > 1, None: len(shapes) == 1}
        if set(shapes) != {expected} or not enough[how_many]:
            self.complain(line, f"{comment[0]} would be {expected}, not {shapes}")

    def complain(self, line: int, message: str) -> None:
        self.complaints.add(f"line {line}: {message}")


def wrong_shapes(source: str, use: Callable[[ShapeWatch], object]) -> list[str]:
    """What is wrong with the shapes of a script, once `use` has called everything in it."""
    watch = ShapeWatch(source)
    use(watch)
    for line in watch.comments.keys() - watch.checked:
        watch.complain(line, "no value was compared with this comment")
    return sorted(watch.complaints)


def use_stage(watch: ShapeWatch) -> None:
    """Run the model in many variants, in training and after, with and without a cache; and main."""
    script, B = watch.script, SIZES["B"]
    if "MultiHeadAttention" not in script:  # a single head has all channels
        watch.sizes = SIZES | {"D": SIZES["C"]}
    idx = torch.randint(SIZES["V"], (B, SIZES["T"]))
    for config in variants(script["Config"]):
        model = script["Model"](config)
        for training in (True, False):
            model.train(training)
            model(idx)
            model(idx, targets=idx)
        if cache := model.new_cache():
            watch.cached = CACHED
            cache[0].last = torch.zeros(B, 1, SIZES["C"])  # for token_shift
            for each in cache:
                each.extend(*torch.zeros(2, B, SIZES["H"], CACHED, SIZES["D"]))
            model(idx, cache=cache)
            watch.cached = 0
    run = mock.MagicMock(config=config, device="cpu", step=0)
    run.batches.return_value = [(idx, idx)]
    run.micro_batches.side_effect = lambda batch: [(*batch, 1.0)]
    script["Run"] = mock.Mock(return_value=run)
    script["main"]()


def variants(config_class: type) -> list[object]:
    """The config with small sizes, with each of its switches changed, and with all of them off."""
    sizes = {"vocab_size": SIZES["V"], "block_size": BLOCK_SIZE}
    sizes |= {"n_embd": SIZES["C"], "n_head": SIZES["H"], "n_layer": 2}
    names = [field.name for field in fields(config_class)]
    sizes = {name: sizes[name] for name in names if name in sizes}
    switches = [field.name for field in fields(config_class) if field.type is bool]
    changes = [{}, dict.fromkeys(switches, False), *({name: False} for name in switches)]
    changes += [{"norm": "post"}] if "norm" in names else []
    return [config_class(**sizes, **change) for change in changes]


def use_common(watch: ShapeWatch) -> None:
    class Table(watch.script["LanguageModel"]):
        def __init__(self) -> None:
            super().__init__()
            self.block_size, self.table = BLOCK_SIZE, torch.nn.Embedding(SIZES["V"], SIZES["V"])

        def forward(self, idx: Tensor) -> tuple[Tensor, None]:
            return self.table(idx), None

    random = torch.Generator()
    watch.script["draw_batch"](torch.arange(100), SIZES["T"], SIZES["B"], random)
    next(Table().generate(list(range(SIZES["T"])), 1.0, None, random))


def use_layers(watch: ShapeWatch) -> None:
    B, T, H, D = (SIZES[letter] for letter in "BTHD")
    watch.cached = CACHED
    key = torch.zeros(B, H, T + CACHED, D)
    watch.script["attention"](key[:, :, CACHED:], key, key, torch.nn.Dropout(0.5))


def use_steps(watch: ShapeWatch) -> None:
    C, D = SIZES["C"], SIZES["D"]
    weights = {name: torch.randn(C, C) for name in ("query", "key", "value", "out")}
    step = {name: name for name in weights} | {"heads": SIZES["H"], "out_bias": None}
    step |= {"norm_eps": 1e-6, "frequencies": [0.1] * (D // 2)}
    watch.script["attend"](step, torch.randn(SIZES["B"], SIZES["T"], C), weights)


USES = {f"{stage}.py": use_stage for stage in STAGES}
USES |= {"common.py": use_common, "trainer/layers.py": use_layers, "explorer/steps.py": use_steps}


@pytest.mark.parametrize("name", USES)
def test_every_shape_comment_is_true(name):
    source = read(name)
    assert shape_comments(source)
    assert wrong_shapes(source, USES[name]) == []


def test_shapes_have_the_same_letters_everywhere():
    for name in tracked("*.py"):
        if name in USES or name.partition("/")[0] not in ("tests", "notebooks", "benchmarks"):
            source = read(name)
            said = {letter for comment in shape_comments(source).values() for letter in comment[1]}
            assert not said or name in USES, f"nobody checks the shape comments in {name}"
            names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
            letters = {each for each in names | said if len(each) == 1 and each.isupper()}
            assert letters <= SIZES.keys() | {"F", "S"}, name  # F is torch.nn.functional
