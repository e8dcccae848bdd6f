"""The page of a comparison: it works by keyboard, on a phone, in the dark and on paper."""

import html
import itertools
import re
from pathlib import Path

from comparison.report import CodeLine, code_of, difference, prose, read_source
from sample import generate, load

import pytest
from conftest import COMPARE_STEPS, ROOT, STAGES

OUT = Path("runs", "compare", "text")
OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"


# What it says.


@pytest.mark.parametrize("before, after", list(itertools.pairwise(STAGES)))
def test_a_difference_turns_one_script_into_the_next(before, after):
    before, after = (code_of(read_source(stage)) for stage in (before, after))
    lines = list(difference(before, after))
    for kind, script in (("added", after), ("gone", before)):
        kept = [line.text for line in lines if line.kind in (kind, "same")]
        places = [script.index(text) for text in kept if script.count(text) == 1]
        assert set(kept) <= set(script) and places == sorted(places)
    added, gone = ([line.text for line in lines if line.kind == kind] for kind in ("added", "gone"))
    assert len(added) - len(gone) == len(after) - len(before)
    assert {line for line in after if line not in before} <= set(added)
    assert {line for line in before if line not in after} <= set(gone)
    assert CodeLine("gap", "") in lines
    assert not any(re.search(r"Stage \d of", line.text) for line in lines)  # that is prose


def test_the_prose_of_the_stages_becomes_html():
    assert prose("    python bigram.py") == "<pre>python bigram.py</pre>"
    assert prose("**A\nmodel** of `a < b`.") == (
        "<p><strong>A\nmodel</strong> of <code>a &lt; b</code>.</p>"
    )
    assert prose("- one\n  more\n- two") == "<ul><li>one\n  more</li><li>two</li></ul>"


@pytest.fixture
def page_source(trained: Path) -> str:
    return (trained / OUT / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_needs_no_script_and_no_other_file(trained, page_source):
    assert "<script" not in page_source  # though the training text is full of them
    assert html.escape("<script>") in page_source
    pattern = r"""(?:src|href|srcset|url|@import)\s*[=(]\s*["']?([^"')\s>]+)"""
    addresses = re.findall(pattern, page_source)
    assert addresses and all(each.startswith("data:") for each in addresses)
    assert str(ROOT) not in page_source and str(trained) not in page_source


@pytest.mark.slow
def test_the_samples_continue_the_same_prompt(trained, page_source):
    articles = re.findall(r"<h3>(.*?)</h3>\s*<pre><b>(.*?)</b>(.*?)</pre>", page_source, re.DOTALL)
    names, prompts, samples = zip(*articles, strict=True)
    assert [name.split()[0] for name in names] == list(STAGES)
    text = (trained / "text.txt").read_text(encoding="utf-8")
    prompt = text[len(text) * 9 // 10 :].split("\n")[1] + "\n"  # not in the training split
    assert set(map(html.unescape, prompts)) == {prompt}
    assert {len(html.unescape(sample)) for sample in samples} == {50}
    assert len(set(samples)) == len(STAGES)
    model, tokenizer = load(trained / OUT / f"residual-{COMPARE_STEPS}-steps-seed-1", "cpu")
    continuation = "".join(generate(model, tokenizer, prompt, length=50, seed=1))
    assert html.unescape(samples[names.index("residual")]) == continuation


# How it looks and works, in a real browser.


@pytest.fixture
def address(trained: Path) -> str:
    return (trained / OUT / "report.html").as_uri()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_overflows_and_nothing_is_fetched(width, browser, address):
    page = browser.new_page(viewport={"width": width, "height": 800})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.evaluate(OPEN_ALL)
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll("body *")].filter(element => {
        const box = element.getBoundingClientRect();
        const hidden = getComputedStyle(element.closest("thead") ?? element).clipPath != "none";
        return !hidden && (box.right > innerWidth + 0.5 || box.left < -0.5
            || element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0);
    }).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    page.close()


@pytest.mark.slow
@pytest.mark.browser
def test_it_works_by_keyboard(browser, address):
    page = browser.new_page()
    page.goto(address)
    for stage in STAGES:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('details')?.id") == stage
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        code = page.locator(f"#{stage} pre.code")
        assert not code.is_visible()
        page.keyboard.press("Enter")
        assert code.is_visible()
        page.keyboard.press("Space")
        assert not code.is_visible()
    page.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_color_scheme_is_readable(scheme, browser, address):
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    page.evaluate(OPEN_ALL)
    for theme in ("light", "dark"):
        pictures = page.locator(f"img.{theme}-only").all()
        assert len(pictures) == 2
        for picture in pictures:
            assert picture.is_visible() == (theme == scheme)
            assert picture.evaluate("each => each.naturalWidth") > 300
    contrasts = page.evaluate(
        """() => {
        const numbers = color => color.match(/[0-9.]+/g).map(Number);
        const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        const behind = element => {
            const color = numbers(getComputedStyle(element).backgroundColor);
            return color.length == 4 && color[3] == 0 ? behind(element.parentElement) : color;
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
    for kind in ("added", "gone"):  # not by color alone
        sign = "each => getComputedStyle(each, '::before').content"
        assert page.locator(f".{kind}").first.evaluate(sign) in ('"+"', '"−"')
    page.close()


@pytest.mark.slow
@pytest.mark.browser
def test_it_prints_on_white(browser, address):
    page = browser.new_page(color_scheme="dark")
    page.goto(address)
    page.emulate_media(media="print", color_scheme="dark")
    body = "getComputedStyle(document.body)"
    assert page.evaluate(f"{body}.backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(f"{body}.color") == "rgb(31, 35, 40)"
    assert page.locator("img.light-only").first.is_visible()
    assert not page.locator("img.dark-only").first.is_visible()
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) <= 8
    page.close()
