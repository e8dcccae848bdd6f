"""The page of a comparison, in a real browser: it works by keyboard, on a phone, in the dark."""

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import COMPARE_STEPS, ROOT, STAGES
from playwright.sync_api import Browser, Page

from comparison.report import CodeLine, difference, read_code
from sample import generate, load


@pytest.fixture
def address(trained: Path) -> str:
    return (trained / "runs" / "compare" / "text" / "report.html").as_uri()


WIDTHS = {"phone": 360, "tablet": 800, "desktop": 1280}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_overflows_and_nothing_is_fetched(
    width: int, scheme: str, browser: Browser, address: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("details[open]").count() == len(STAGES)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll("body *")].filter(element => {
        const box = element.getBoundingClientRect();
        const hidden = getComputedStyle(element.closest("thead") ?? element).clipPath != "none";
        return !hidden && (box.right > innerWidth + 0.5 || box.left < -0.5
            || element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0);
    }).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    page.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(address)
    yield page
    page.close()


def test_it_works_by_keyboard(page: Page) -> None:
    for stage in STAGES:
        page.keyboard.press("Tab")
        focused = "document.activeElement.closest('details')?.id"
        assert page.evaluate(focused) == stage
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
        code = page.locator(f"#{stage} pre.code")
        assert not code.is_visible()
        page.keyboard.press("Enter")
        assert code.is_visible()
        page.keyboard.press("Space")
        assert not code.is_visible()


@pytest.mark.parametrize("before, after", list(itertools.pairwise(STAGES)))
def test_a_step_shows_what_its_stage_adds(before: str, after: str, page: Page) -> None:
    page.locator(f"#{after} summary").click()
    old, new = (read_code(stage) for stage in (before, after))
    added = page.locator(f"#{after} .added").all_inner_texts()
    added = [line.rstrip("\n") for line in added]
    assert [line for line in new if line not in old and line] == [
        line for line in added if line not in old and line
    ]
    colours = {
        page.locator(f"#{after} .{kind}").first.evaluate(
            "each => getComputedStyle(each).background"
        )
        for kind in ("added", "same")
    }
    assert len(colours) == 2
    sign = "each => getComputedStyle(each, '::before').content"
    assert page.locator(f"#{after} .added").first.evaluate(sign) == '"+"'  # not by colour alone
    text = page.locator(f"#{after} .lesson").inner_text()
    assert "What is new: " in text and "Why it helps: " in text
    assert "`" not in text.partition("\nWhat ")[0]


def test_a_difference_turns_one_script_into_the_other() -> None:
    before, after = (read_code(stage) for stage in ("residual", "layer_norm"))
    lines = list(difference(before, after))
    for kind, script in (("added", after), ("gone", before)):
        kept = [line.text for line in lines if line.kind in (kind, "same")]
        assert set(kept) <= set(script)
        places = [script.index(text) for text in kept if script.count(text) == 1]
        assert places == sorted(places)
    added, gone = ([line.text for line in lines if line.kind == kind] for kind in ("added", "gone"))
    assert len(added) - len(gone) == len(after) - len(before)
    assert {line for line in after if line not in before} <= set(added)
    assert {line for line in before if line not in after} <= set(gone)
    assert lines.count(CodeLine("gap", "")) > 1
    assert not any("Stage 6 of 7" in line.text for line in lines)


def test_the_samples_go_on_from_the_same_prompt(page: Page, trained: Path) -> None:
    names = page.locator(".samples h3").all_inner_texts()
    assert names == [*STAGES[:-2], *(f"{stage} --preset small" for stage in STAGES[-2:])]
    samples = page.locator(".samples pre").all_text_contents()
    text = (trained / "text.txt").read_text(encoding="utf-8")
    lines = text[len(text) * 9 // 10 :].split("\n")
    prompt = lines[1] + "\n"  # the first whole line that no stage has learnt
    assert {sample[: len(prompt)] for sample in samples} == {prompt}
    assert {len(sample) for sample in samples} == {len(prompt) + 50}
    assert len(set(samples)) == len(STAGES)
    folder = trained / "runs" / "compare" / "text" / f"residual-{COMPARE_STEPS}-steps-seed-1"
    model, tokenizer = load(folder, "cpu")
    continued = "".join(generate(model, tokenizer, prompt, length=50, seed=1))
    assert samples[STAGES.index("residual")] == prompt + continued


def test_the_table_is_the_one_that_was_printed(page: Page, trained: Path) -> None:
    rows = page.locator("#numbers ~ table tr").all()
    cells = [row.locator("th, td").all_inner_texts() for row in rows]
    markdown = (trained / "runs" / "compare" / "text" / "table.md").read_text(encoding="utf-8")
    expected = [
        line.strip("|").replace("`", "").split("|")
        for line in markdown.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert cells == [[cell.strip() for cell in row] for row in expected]


@pytest.mark.parametrize("scheme, shown", [("light", "light"), ("dark", "dark")])
def test_the_pictures_suit_the_background(
    scheme: str, shown: str, browser: Browser, address: str
) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    for theme in ("light", "dark"):
        pictures = page.locator(f"img.{theme}-only")
        assert pictures.count() == 2
        for picture in pictures.all():
            assert picture.is_visible() == (theme == shown)
            assert picture.evaluate("each => each.naturalWidth") > 300
            assert "Validation loss" in picture.get_attribute("alt")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_can_be_read_has_contrast(scheme: str, browser: Browser, address: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    for summary in page.locator("summary").all():
        summary.click()
    contrasts = page.evaluate(
        """() => {
        const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
        const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        const behind = element => {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            return colour.length == 4 && colour[3] == 0
                ? behind(element.parentElement) : colour;
        };
        return [...document.querySelectorAll("p, h1, h2, h3, b, td, th, pre, code span, .number")]
            .map(element => {
                const [a, b] = [light(numbers(getComputedStyle(element).color)),
                                light(behind(element))];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
    )
    assert len(contrasts) > 500
    assert min(contrasts) >= 4.5
    page.close()


def test_it_prints_on_white(browser: Browser, address: str) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(address)
    page.emulate_media(media="print", color_scheme="dark")
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(f"{style}.color") == "rgb(31, 35, 40)"
    assert page.locator("img.light-only").first.is_visible()
    assert not page.locator("img.dark-only").first.is_visible()
    pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
    assert 2 <= pages <= 8
    page.close()


def test_it_needs_no_script_and_no_other_file(trained: Path) -> None:
    source = (trained / "runs" / "compare" / "text" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source  # though the text that was learnt is full of them
    assert html.escape("<script>") in source
    addresses = re.findall(
        r"""(?:src|href|srcset|url|@import)\s*[=(]\s*["']?([^"')\s>]+)""", source
    )
    assert addresses and all(each.startswith("data:") for each in addresses)
    assert str(ROOT) not in source and str(trained) not in source
