"""A diagram of each stage's model, from characters to logits; the stage's new parts are filled.

python -m comparison.diagram      writes results/diagrams
"""

from pathlib import Path
from typing import NamedTuple

from comparison.drawing import standalone, text
from trainer.folder import write_whole

WIDTH = 370
STYLE = """<style>svg { font: 15px system-ui, sans-serif; background: var(--background) }
text { fill: var(--ink); text-anchor: middle } .note { fill: var(--quiet); font-size: 13px }
rect { fill: var(--background); stroke: var(--quiet); stroke-width: 1.5; rx: 6 }
.frame { stroke-dasharray: 5 4 }
path, circle { fill: none; stroke: var(--quiet); stroke-width: 1.5 }
circle { fill: var(--background) } .new rect { fill: currentColor; fill-opacity: 0.18 }
.new rect, .new path, .new circle { stroke: currentColor; stroke-width: 2.5 }
.new .note { fill: currentColor } .new .frame { fill: var(--background) }</style>"""
NEW = "--light: #0a63a8; --dark: #6cb6ff"


class Part(NamedTuple):
    """A box with a label."""

    label: str
    note: str = ""  # printed to the right of the box
    is_new: bool = False


class Stage(NamedTuple):
    before: list[Part]  # the boxes before the blocks
    sublayers: list[list[Part]]  # a block's sublayers, or the model's if it has no blocks
    after: list[Part]
    blocks: str = ""  # such as "× 3"
    blocks_are_new: bool = False
    skips: str = ""  # "old" or "new"


TABLE = Part("table of logits", "V × V", True)
TOKENS, HEAD = Part("token embedding", "+ positions"), Part("lm_head", "linear, C → V")
ATTENTION = Part("multi-head attention", "4 heads")
MLP, NORM = Part("feed-forward", "C → 4C → C"), Part("LayerNorm")


def new(part: Part, **changes: object) -> Part:
    return part._replace(is_new=True, **changes)


STAGES = {
    "bigram": Stage([TABLE], [], []),
    "self_attention": Stage(
        [new(TOKENS)], [[new(Part("self-attention", "one head"))]], [new(HEAD)]
    ),
    "multihead_attention": Stage([TOKENS], [[new(ATTENTION, note="4 heads, a list")]], [HEAD]),
    "batched_attention": Stage([TOKENS], [[new(ATTENTION, note="4 heads, one tensor")]], [HEAD]),
    "feed_forward": Stage([TOKENS], [[ATTENTION], [new(MLP)]], [HEAD]),
    "residual": Stage([TOKENS], [[ATTENTION], [MLP]], [HEAD], "× 3", True, "new"),
    "layer_norm": Stage(
        [TOKENS], [[new(NORM), ATTENTION], [new(NORM), MLP]], [new(NORM), HEAD], "× 3", False, "old"
    ),
    "gpt": Stage(
        [TOKENS, new(Part("dropout"))],
        [[NORM, ATTENTION, new(Part("dropout"))], [NORM, MLP, new(Part("dropout"))]],
        [NORM, HEAD],
        "× 4 or 6",
        True,
        "old",
    ),
    "modern_gpt": Stage(
        [
            Part("token embedding", "no positions"),
            new(Part("token shift", "+ μ · previous")),
            new(Part("RMSNorm")),
        ],
        [
            [new(Part("+ λ · embedding"))],
            [new(Part("RMSNorm")), new(ATTENTION, note="RoPE, QK norm")],
            [new(Part("RMSNorm")), new(MLP, note="squared ReLU")],
        ],
        [new(Part("RMSNorm")), HEAD],
        "× 4 or 6",
        False,
        "old",
    ),
}


class Drawing:
    """Boxes from top to bottom, joined by a line."""

    def __init__(self) -> None:
        self.y, self.shapes = 34, [text(130, 20, "characters", "middle")]

    def group(self, shapes: str, is_new: bool) -> str:
        return f'<g class="new" style="{NEW}">{shapes}</g>' if is_new else shapes

    def line(self, length: float) -> None:
        self.shapes.append(f'<path d="M130 {self.y}v{length}"/>')
        self.y += length

    def box(self, part: Part) -> None:
        self.line(16)
        box = f'<rect x="44" y="{self.y}" width="172" height="30"/>'
        label = text(130, self.y + 20, part.label, "middle")
        note = f'<text class="note" x="232" y="{self.y + 20}" style="text-anchor: start">'
        note = f"{note}{part.note}</text>" if part.note else ""
        self.shapes.append(self.group(box + label + note, part.is_new))
        self.y += 30

    def sublayer(self, parts: list[Part], skip: str) -> None:
        if not skip or parts[0].label.startswith("+"):
            for part in parts:
                self.box(part)
            return
        self.line(10)
        top = self.y
        for part in parts:
            self.box(part)
        self.line(16)
        bottom = self.y + 10
        plus = f'<path d="M124 {bottom}h12M130 {bottom - 6}v12"/>'
        circle = f'<circle cx="130" cy="{bottom}" r="10"/>'
        around = f'<path d="M130 {top}H24V{bottom}H120"/>'
        self.shapes.append(self.group(around + circle + plus, skip == "new"))
        self.y = bottom + 10


def diagram(name: str) -> str:
    stage, drawing = STAGES[name], Drawing()
    for part in stage.before:
        drawing.box(part)
    top = drawing.y + 8
    if stage.blocks:
        drawing.line(14)
    for parts in stage.sublayers:
        drawing.sublayer(parts, stage.skips)
    if stage.blocks:
        drawing.line(12)
        frame = f'<rect class="frame" x="8" y="{top}" width="354" height="{drawing.y - top - 4}"/>'
        label = f'<text class="note" x="354" y="{top + 20}" style="text-anchor: end">'
        label += f"block {stage.blocks}</text>"
        drawing.shapes.insert(0, drawing.group(frame + label, stage.blocks_are_new))
    for part in stage.after:
        drawing.box(part)
    drawing.line(16)
    drawing.shapes.append(text(130, drawing.y + 16, "logits of the next character", "middle"))
    size = f'width="{WIDTH}" height="{drawing.y + 26}" viewBox="0 0 {WIDTH} {drawing.y + 26}"'
    title = f"<title>The model of {name}.py</title>"
    shapes = "".join(drawing.shapes)
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{title}{STYLE}{shapes}</svg>'


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "results" / "diagrams"
    folder.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        for theme, suffix in {"light": "", "dark": "-dark"}.items():
            write_whole(folder / f"{name}{suffix}.svg", standalone(diagram(name), theme))


if __name__ == "__main__":
    main()
