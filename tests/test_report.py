"""The page of a comparison and its pictures: as text, and in a real browser."""

import html
import itertools
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from compare import SMALL_STAGES, link
from comparison.diagram import STAGES as DIAGRAMS
from comparison.diagram import diagram
from comparison.drawing import THEMES, curves, palette, staircase, standalone
from comparison.report import first_line, highlighted, prose, report, sample_of, steps
from comparison.runs import read_run
from comparison.table import Row, notes, rows_of, table
from sample import generate, load
from trainer.corpus import open_corpus
from trainer.sampling import SampleSettings

import pytest
from conftest import ROOT, STAGES
from fake_runs import write_run

LADDER = [*SMALL_STAGES, "gpt", "modern_gpt", "modern_gpt --no-rope --no-muon --no-rms-norm"]
MANY = [f"layer_norm --n-embd {8 * i} --max-iters 500" for i in range(1, 26)]


def fake_rows(folder: Path, commands: list[str]) -> list[Row]:
    """Two fake runs of each command, linked as compare.py does; the 25th is far better."""
    text, numbers = folder / "text.txt", random.Random(1)
    text.write_text(100 * 'line <script>alert("1")</script> & more\n', encoding="utf-8")
    for i, (command, seed) in enumerate(itertools.product(commands, (1, 2))):
        loss = 4 - 0.03 * i + numbers.uniform(0, 0.2) - 2 * (i > 47)
        write_run(folder / f"run-{i:02}", command, open_corpus(text), seed, loss, 2.0**i)
    rows = rows_of(map(read_run, sorted(folder.glob("run-*"))))
    link(rows, over_first=False)
    return rows


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return fake_rows(tmp_path_factory.mktemp("ladder"), LADDER)


def contrast(*colors: list[float]) -> float:  # as WCAG defines it, of values up to 255
    lights = []
    for color in colors:
        parts = (x / 255 for x in color)
        red, green, blue = (x / 12.92 if x < 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("count", range(1, 41))
def test_colors_are_readable_and_tell_rows_apart(count):
    for theme in THEMES:
        assert len({(getattr(color, theme), color.dash) for color in palette(count)}) == count
        shades = [bytes.fromhex(getattr(color, theme)[1:]) for color in palette(count)]
        background = bytes.fromhex(THEMES[theme]["background"][1:])
        assert min(contrast(shade, background) for shade in shades) >= 4.5
        assert all(contrast(a, b) > 1.4 for a, b in itertools.pairwise(shades))


def test_a_staircase_descends_by_the_improvements(ladder):
    ends, scales = {}, []
    groups = ElementTree.fromstring(staircase(ladder)).findall(".//{*}g")
    for row, group in zip(ladder, groups, strict=True):
        paths = [re.findall(r"-?[\d.]+", path.get("d")) for path in group.findall(".//{*}path")]
        (start, _, ends[row.name]), _, *whisker = [[*map(float, path)] for path in paths]
        if row.improvement:
            scales.append((ends[row.name] - start) / row.improvement.value)
            scales.append((whisker[0][4] - whisker[0][0]) / row.improvement.error / 2)
            assert start == ends[row.baseline.name]
            assert str(row.improvement) in [text.text for text in group.findall(".//{*}text")]
    assert min(scales) > 0 and scales == pytest.approx([scales[0]] * len(scales), rel=0.05)


@pytest.mark.parametrize("commands", [MANY[:1], MANY[:2], MANY, LADDER], ids=len)
def test_pictures_of_any_number_of_rows(commands, tmp_path):
    rows = fake_rows(tmp_path, commands)
    svg = ElementTree.fromstring(curves(rows, "seconds"))
    labels = sorted(float(g.findall("{*}text")[-1].get("y")) for g in svg.findall(".//{*}g"))
    assert len(labels) == len(rows) and 0 < labels[0] <= labels[-1] < int(svg.get("height"))
    assert all(b - a > 19 for a, b in itertools.pairwise(labels))
    titles = [title.text for title in svg.findall(".//{*}title")]
    loss = sum(run.rows[1]["val_loss"] for run in rows[0].runs) / 2
    assert f"{rows[0].name}, step 500: {loss:.3f}" in titles
    assert len(titles) == sum(len(row.runs[0].rows) - 1 for row in rows)  # those after training
    assert curves(rows, "step").count('"8 4"') == sum(row.is_variant for row in rows)
    for picture, theme in itertools.product((staircase(rows), curves(rows, "step")), THEMES):
        file = standalone(picture, theme).decode()
        assert "var(" not in file and f"background: {THEMES[theme]['background']}" in file
        assert "nan" not in file and f"color: {getattr(palette(len(rows))[-1], theme)}" in file
    del rows[0].runs[0].rows[1]  # one run was evaluated at other steps, unless it had only one
    assert curves(rows, "step").count('"line"') == len(rows) + (commands == LADDER)
    del rows[0].runs[0].rows[1:], rows[0].runs[1:]
    assert "(stopped," in staircase(rows) and curves(rows, "step")


@pytest.mark.parametrize("name", STAGES)
def test_the_diagrams_are_current(name):
    for theme, suffix in {"light": "", "dark": "-dark"}.items():
        path = ROOT / "results" / "diagrams" / f"{name}{suffix}.svg"
        assert path.read_bytes() == standalone(diagram(name), theme)
        ElementTree.fromstring(path.read_bytes())
    assert ('class="new"' in diagram(name)) and tuple(DIAGRAMS) == STAGES


def test_steps_turn_one_script_into_the_next_as_html(ladder):
    pairs = zip(steps(ladder), STAGES, (None, *STAGES), strict=False)
    for (row, *_, before, lines), stage, previous in pairs:
        assert (row.stage, before) == (stage, previous)
        for kind, script in (("added", stage), ("gone", previous or stage)):
            code = iter((ROOT / f"{script}.py").read_text(encoding="utf-8").split("\n"))
            shown = [re.sub("<.*?>", "", line) for each, line in lines if each in (kind, "same")]
            assert all(html.unescape(line) in code for line in shown)  # in this order
    assert '"keyword">def</span> <span class="defined">f</span>' in highlighted("def f(): 0")[0]
    assert prose("**A\nb** `<`") == "<p><strong>A\nb</strong> <code>&lt;</code></p>"
    assert prose("- one\n  more\n- two") == "<ul><li>one\n  more</li><li>two</li></ul>"


def test_samples_continue_the_first_line_of_the_validation_split(small_run, text):
    small_run("residual", "--seed", 3)
    settings = SampleSettings(first_line(open_corpus(text)), 30, temperature=0.5)
    expected = generate(*load("runs/residual"), settings.prompt, 30, 0.5, seed=3)
    assert sample_of(*rows_of([read_run(Path("runs/residual"))]), settings) == "".join(expected)


@pytest.fixture(scope="module")
def address(ladder: list[Row]) -> str:
    path = ladder[0].runs[0].folder.with_name("report.html")
    corpus = open_corpus(path.with_name("text.txt"))
    how = SampleSettings(first_line(corpus))
    path.write_bytes(report(ladder, table(ladder), notes(ladder), "A warning.", corpus, how))
    return path.as_uri()


TEXTS = r"""() => [...document.querySelectorAll("nav *, main *")].filter(
  each => each.firstChild?.data?.trim() && each.getBoundingClientRect().height
).map(each => {
  let back = each, box = each.getBoundingClientRect(), css = getComputedStyle;
  while (css(back).backgroundColor.endsWith(", 0)")) back = back.parentElement;
  const fits = box.height >= 12 && (box.right <= innerWidth || !!each.closest(".scroll, pre"));
  const ink = css(each)[each.closest("svg") ? "fill" : "color"];
  return [fits, ...[ink, css(back).backgroundColor].map(x => x.match(/\d+/g).map(Number))];
})"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 846, 1024, 1440])
def test_the_page_is_readable_and_fits_screens_and_paper(width, scheme, browser, address):
    page, events = browser.new_page(color_scheme=scheme), []
    page.set_viewport_size({"width": width, "height": 800})
    for name in ("console", "pageerror", "dialog", "request"):
        page.on(name, lambda event: events.append(getattr(event, "url", event)))
    page.goto(address)
    page.click("#expand")
    assert [each for each in events if not str(each).startswith("data:")] == [address]
    texts = page.evaluate(TEXTS)
    assert len(texts) > 500 and all(fits for fits, *_ in texts)
    assert min(contrast(*colors) for _, *colors in texts) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scrolls = "all => all.some(each => each.scrollWidth > each.clientWidth)"
    assert page.locator(".scroll").evaluate_all(scrolls) == (width < 1024)
    assert page.locator("pre.code").evaluate_all(scrolls) or width > 390
    heights = page.locator(".code .added").evaluate_all("all => all.map(x => x.offsetHeight)")
    assert len(set(heights)) == 1  # no line wraps
    page.emulate_media(media="print")
    assert page.locator("article:visible").count() == len(STAGES)
    assert page.locator("button:visible, input:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    page.close()


@pytest.mark.browser
def test_it_works_by_keyboard_by_pointer_and_without_scripts(browser, address, ladder):
    page = browser.new_page()
    page.goto(f"{address}#residual")
    assert page.locator("details[open]").get_attribute("id") == "residual"
    page.press("#gpt summary", "Enter")
    assert page.locator("#gpt .code").is_visible()
    for expected in (len(STAGES), 0):
        page.click("#expand")
        assert page.locator("details[open]").count() == expected
    sample, tip = page.locator("article:visible h3"), page.locator(".tip:visible")
    for key, row in (("ArrowRight", ladder[1]), ("End", ladder[-2]), ("Home", ladder[0])):
        page.press("#slider", key)
        assert sample.inner_text().split() == [*row.name.split(), "loss", *str(row.loss).split()]
    page.locator(".stops button").last.click()
    assert ladder[-2].name in sample.inner_text()
    page.locator(".chart circle").first.hover()
    assert re.fullmatch(r"\S+, step 500: \d\.\d{3}", tip.inner_text())
    page.locator(".chart circle").first.press("ArrowRight")
    assert ", step 1,000: " in tip.inner_text()
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    assert page.locator("article:visible").count() == len(STAGES)
    assert page.locator("button:visible, input:visible").count() == 0
