"""The scripts keep their word: importing is free, neighbours differ as told, shapes are true.

Nothing is trained here. The scripts are read as texts and, for the shapes, run on one batch.
"""

import ast
import importlib
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from common import Tokenizer

ROOT = Path(__file__).parent.parent
STAGES = [
    "bigram",
    "self_attention",
    "multihead_attention",
    "feed_forward",
    "residual",
    "layer_norm",
    "gpt",
    "modern_gpt",
]
every_stage = pytest.mark.parametrize("stage", STAGES)
neighbours = pytest.mark.parametrize("before, after", list(itertools.pairwise(STAGES)))


def read(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


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
assert torch.equal(torch.get_rng_state(), before), "a weight or a batch was drawn"
"""


def test_importing_the_scripts_does_nothing_else(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_AND_WATCH, *STAGES]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@every_stage
def test_a_stage_stands_alone(stage):
    imported = set()
    for node in ast.walk(ast.parse(read(stage))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    roots = {name.partition(".")[0] for name in imported}
    assert roots - sys.stdlib_module_names == {"torch", "common", "training"}


# The settings.

# What a stage adds to the settings of the one before; gpt has sizes of its own.
CLASSIC = {
    "bigram": {
        "vocab_size": 65,
        "block_size": 8,
        "batch_size": 32,
        "max_iters": 5000,
        "eval_interval": 500,
        "learning_rate": 1e-2,
    },
    "self_attention": {"n_embd": 32, "learning_rate": 1e-3},
    "multihead_attention": {"n_head": 4},
    "feed_forward": {},
    "residual": {"n_layer": 3},
    "layer_norm": {},
}


def test_the_small_stages_share_the_classic_setting():
    expected = {}
    for stage, added in CLASSIC.items():
        expected |= added
        config = asdict(importlib.import_module(stage).Config())
        numbers = {name: value for name, value in config.items() if type(value) in (int, float)}
        assert numbers == expected, stage


@every_stage
def test_every_setting_says_what_it_is(stage):
    text = members(read(stage))
    for field in fields(importlib.import_module(stage).Config):
        assert re.search(r"  # \w.*\w", text[f"Config.{field.name}"]), field.name


# The difference between neighbours is what the later one says it is.


def members(source: str) -> dict[str, str]:
    """The parts of a script by name: functions, constants, and each class piece by piece.

    A class itself has its first lines and its docstring. Comments belong to what follows them.
    """
    lines = source.splitlines()
    result = {}
    tree = ast.parse(source)
    end = 0  # the last line that is dealt with

    def add(name: str, last: int) -> None:
        nonlocal end
        assert name not in result, f"{name} is defined twice"
        result[name] = "\n".join(lines[end:last]).strip("\n")
        end = last

    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or is_docstring(node):
            end = node.end_lineno
        elif isinstance(node, ast.ClassDef):
            first, *rest = node.body
            if is_docstring(first):
                add(node.name, first.end_lineno)
            else:
                add(node.name, first_line(first) - 1)
                rest = node.body
            for part in rest:
                add(f"{node.name}.{name_of(part)}", part.end_lineno)
        else:
            add(name_of(node), node.end_lineno)
    return result


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])


def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return ast.unparse(node).splitlines()[0]  # as `if __name__ == '__main__':`


def real_differences(before: dict[str, str], after: dict[str, str]) -> dict[str, set[str]]:
    def only_in(one: dict[str, str], other: dict[str, str]) -> set[str]:
        """A class that the other lacks altogether counts as a whole."""
        return {
            name
            for name in one.keys() - other.keys()
            if "." not in name or name.partition(".")[0] in other
        }

    return {
        "new": only_in(after, before),
        "changed": {name for name in before.keys() & after.keys() if before[name] != after[name]},
        "gone": only_in(before, after),
    }


def told_differences(docstring: str, before: str) -> dict[str, set[str]]:
    """The names after `new:`, `changed:` and `gone:`; what stands in parentheses is a remark."""
    _, heading, block = docstring.partition(f"\nSince {before}.py\n")
    assert heading, f"the docstring does not say what is new since {before}.py"
    block = re.sub(r"\([^()]*\)", "", block.partition("\n\n")[0])
    told = {"new": set(), "changed": set(), "gone": set()}
    for kind, names in re.findall(r"(\w+):([^:]*)(?=\s\w+:|$)", block):
        told[kind] = {name.strip() for name in names.split(",")}
    return told


@neighbours
def test_neighbours_differ_in_what_the_later_one_says(before, after):
    docstring = ast.get_docstring(ast.parse(read(after)))
    real = real_differences(members(read(before)), members(read(after)))
    assert told_differences(docstring, before) == real


@neighbours
def test_neighbours_keep_their_order(before, after):
    names, later_names = list(members(read(before))), list(members(read(after)))
    assert [name for name in names if name in later_names] == [
        name for name in later_names if name in names
    ]


# Shapes are true: every shape comment is compared with the tensor while the code runs.

# All differ, also from 3 and 4, which stand in the comments as numbers, and from T + 1.
SIZES = {"B": 5, "T": 8, "C": 84, "H": 6, "D": 14, "V": 11}
CACHED = 4  # so many characters are in a cache: attention sees S = T + CACHED of them
BLOCK_SIZE = 13  # what T means where no text has come in yet, in `__init__`
SHAPE_COMMENT = re.compile(r"# \(([^()a-z]+)\)(?: (each|both)\b)?")


def shape_comments(source: str) -> dict[int, re.Match]:
    """The comments such as `# (B, T, C)`, by their lines."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (comment := SHAPE_COMMENT.match(token.string)):
            found[token.start[0]] = comment
    return found


class ShapeWatch(ast.NodeTransformer):
    """Runs a script and looks at the values that its assignments and `return`s have.

    Where the line ends with a shape comment, the value must have that shape. In a `forward` a
    shape that no local tensor has yet must have such a comment.
    """

    def __init__(self, source: str, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.comments = shape_comments(source)
        self.checked = set()
        self.complaints = set()
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

    def visit_value(self, node: ast.Assign | ast.AnnAssign | ast.Return) -> ast.stmt:
        """Make `x = value` into `x = look_at(value, ...)`, and `a, b = value` the same apart."""
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
                    self.complain(line, f"{shape} is new and goes without a comment")
        return value

    def compare(self, comment: re.Match, shapes: list, line: int, sizes: dict[str, int]) -> None:
        told, how_many = comment.groups()
        expected = eval(f"({told},)", {}, sizes)
        enough = {"both": len(shapes) == 2, "each": len(shapes) > 2, None: len(shapes) == 1}
        if set(shapes) != {expected} or not enough[how_many]:
            self.complain(line, f"{comment[0]} would be {expected}, not {shapes}")

    def complain(self, line: int, message: str) -> None:
        self.complaints.add(f"line {line}: {message}")


def wrong_shapes(source: str, use: Callable[[dict], object], sizes: dict[str, int]) -> list[str]:
    """What is wrong with the shapes of a script, once `use` has called everything in it."""
    watch = ShapeWatch(source, sizes)
    use(watch.script)
    if hasattr(watch.script.get("Model"), "new_caches"):
        watch.cached = CACHED
        use_caches(watch.script)
    for line in watch.comments.keys() - watch.checked:
        watch.complain(line, "no value was compared with this comment")
    return sorted(watch.complaints)


def use_stage(script: dict) -> None:
    """Run the model in every variant that its config offers, in training and after."""
    B, T = SIZES["B"], SIZES["T"]
    idx = torch.randint(SIZES["V"], (B, T))
    for config in variants(script["Config"]):
        model = script["Model"](config)
        for training in (True, False):
            model.train(training)
            model(idx)
            model(idx, targets=idx)


def use_caches(script: dict) -> None:
    """Let the model go on from a few characters that it has seen."""
    for config in variants(script["Config"]):
        model = script["Model"](config).eval()
        caches = model.new_caches()
        for cache in caches:
            D = SIZES["C"] // SIZES["H"]
            cache.extend(torch.zeros(2, SIZES["B"], SIZES["H"], CACHED, D))
        model(torch.zeros(SIZES["B"], SIZES["T"], dtype=torch.long), caches=caches)


def variants(config_class: type) -> Iterator[object]:
    sizes = {"vocab_size": SIZES["V"], "block_size": BLOCK_SIZE}
    sizes |= {"n_embd": SIZES["C"], "n_head": SIZES["H"], "n_layer": 2}
    options = {}
    for field in fields(config_class):
        if field.name in sizes:
            options[field.name] = (sizes[field.name],)
        elif field.type in (bool, bool | None):
            options[field.name] = (True, False)
        elif get_origin(field.type) is tuple:
            options[field.name] = ((), get_args(get_args(field.type)[0]))
        elif get_origin(field.type) is Literal:
            options[field.name] = get_args(field.type)
    for choice in itertools.product(*options.values()):
        yield config_class(**dict(zip(options, choice, strict=True)))


def use_common(script: dict) -> None:
    script["draw_batch"](torch.arange(100), SIZES["T"], SIZES["B"], torch.Generator())


def use_sample(script: dict) -> None:
    bigram = importlib.import_module("bigram")
    vocabulary = "abcdefghijk"
    model = bigram.Model(bigram.Config(vocab_size=len(vocabulary), block_size=BLOCK_SIZE))
    prompt = vocabulary[: SIZES["T"]]
    list(script["generate"](model, Tokenizer(vocabulary), prompt, length=1))


USES = dict.fromkeys(STAGES, use_stage) | {"common": use_common, "sample": use_sample}


@pytest.mark.parametrize("name", USES)
def test_every_shape_comment_is_true(name):
    # The only head of stage 2 has all channels for itself.
    sizes = SIZES | ({"D": SIZES["C"]} if name == "self_attention" else {})
    source = read(name)
    assert shape_comments(source)
    assert wrong_shapes(source, USES[name], sizes) == []


def test_shapes_are_told_in_the_same_letters_everywhere():
    for path in ROOT.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        told = {letter for comment in shape_comments(source).values() for letter in comment[1]}
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        letters = {name for name in names | told if len(name) == 1 and name.isupper()}
        assert letters <= SIZES.keys() | {"F", "S"}, path.name  # F is torch.nn.functional
        assert not told or path.stem in USES, f"nobody checks the shape comments in {path.name}"


LESSON = """
import torch

class Lesson:
    def __init__(self):
        self.mask = torch.ones(13, 13).tril()  # (T, T)

    def forward(self, x):
        B, T, C = x.shape
        query, key = torch.stack((x, x))  # (B, T, C) both
        scores = query @ key.transpose(1, 2)  # (B, T, T)
        scores = scores + self.mask[:T, :T]
        return scores.flatten(
            1
        )  # (B, T*T)
"""


def use_lesson(script: dict) -> None:
    script["Lesson"]().forward(torch.ones(SIZES["B"], SIZES["T"], SIZES["C"]))


def test_a_true_lesson_is_left_in_peace():
    assert wrong_shapes(LESSON, use_lesson, SIZES) == []


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("# (B, T, T)", "# (B, T, C)"),  # another letter
        ("# (B, T, T)", "# (B, T)"),  # a dimension too few
        ("# (B, T, T)", ""),  # a new shape, not told
        ("# (B, T*T)", ""),
        ("# (T, T)", "# (B, T)"),
        ("# (B, T, C) both", "# (B, T, D) both"),
        ("# (B, T, C) both", "# (B, T, C)"),  # of two values
        ("        scores = scores +", "        # (B, T, T)\n        scores = scores +"),  # of none
        ("return scores", "if T == 1:\n            return x  # (B, T, C)\n        return scores"),
        ("# (B, T, C) both", "# (B, T, C) each"),
        ("B, T, C = x.shape", "B, T, C = x.shape\n        D = C"),  # a letter with another meaning
    ],
)
def test_a_wrong_shape_is_found(right, wrong):
    assert LESSON.count(right) == 1
    assert len(wrong_shapes(LESSON.replace(right, wrong), use_lesson, SIZES)) >= 1
