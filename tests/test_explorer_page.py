"""How the page of explore.py behaves: in a real browser, with small models that nobody trained."""

import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import explore
from common import Tokenizer

import pytest
import torch
from test_report import TEXTS, contrast

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LETTERS = "\n .:abcdefghijklmnopqrstuvwxyz"
HOSTILE = "\n \"'&<>/script\\`${}é😀א\u0301\u200d\u202e\u2028\ufeff\t"
SIZES = {"n_embd": 16, "block_size": 16}
MANY = SIZES | {"n_head": 2, "n_layer": 2}
MODELS = {"bigram": {"block_size": 16}, "self_attention": SIZES, "gpt": MANY, "modern_gpt": MANY}
ABOUT = {"corpus": {"name": "text", "path": "none"}, "val_loss": 2.5, "step": 9, "parameters": 99}
PROMPT = "the cat. the cat"
TRACE = "(text) => explorer.trace(explorer.models[0], text)"
GENERATE = "(how) => explorer.generate(explorer.models.at(-1), how.text, how.count, how)"
SETTLE = "(async () => { await refresh(); await predict(); await compare(); await follow(); })()"


def model(stage: str, name: str = "", vocabulary: str = LETTERS) -> explore.Packed:
    """A model as explore.py packs it, with weights so large that every part matters."""
    module = importlib.import_module(stage)
    torch.manual_seed(1)
    network = module.Model(module.Config(vocab_size=len(vocabulary), **MODELS[stage])).eval()
    for parameter in network.requires_grad_(False).parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return explore.pack_model(
        network, Tokenizer(vocabulary), name or stage, ABOUT | {"stage": stage}
    )


@pytest.fixture(scope="module")
def models() -> dict[str, explore.Packed]:
    return {name: model(name) for name in MODELS}


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable]:
    """A function that opens a page and types; in the end, no error or request may have come."""
    opened, events = [], []

    def open_page(*packed: Any, text: str = PROMPT, width: int = 1024, **options: Any) -> Any:
        path = tmp_path / "explore.html"
        path.write_bytes(explore.page([*packed]))
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        for event in ("console", "pageerror", "dialog", "request"):
            page.on(event, lambda event: events.append(str(getattr(event, "url", event))))
        page.goto(path.as_uri())
        page.evaluate("explorer.ready")
        page.fill("#input", text)
        opened.append(page)
        return settled(page)

    yield open_page
    assert [each for each in events if not each.startswith(("blob:", "data:", "file:"))] == []
    for page in opened:
        page.close()


def settled(page: Any) -> Any:
    """The page after it has computed what it shows."""
    page.evaluate(SETTLE)
    return page


def text_of(page: Any) -> str:
    return settled(page).locator("#input").input_value()


def numbers(text: str) -> list[float]:
    return [float(each.replace("−", "-")) for each in re.findall(r"[−+]?\d+\.\d+", text)]


def rows(page: Any, selector: str) -> list[list[str]]:
    """The texts of the visible buttons of a list, or of the rows of a table."""
    found = page.locator(selector).filter(visible=True).all_inner_texts()
    return [re.split(r"\s*[\n\t]\s*", each.strip()) for each in found]


def shown(token: str) -> str:
    return {"\n": "⏎", " ": "·"}.get(token, token)


def test_the_color_of_a_character_is_its_surprise(models, open_page):
    page = open_page(models["gpt"])
    losses = page.evaluate(TRACE, PROMPT)["losses"]
    characters = page.locator("#characters [role=option]")
    assert characters.all_inner_texts() == [*map(shown, PROMPT)]
    find = "all => all.map(each => getComputedStyle(each).backgroundColor.match(/\\d+/g))"
    blue = [int(color[2]) for color in characters.locator("bdi").evaluate_all(find)]
    order = sorted(range(1, len(PROMPT)), key=losses.__getitem__)
    assert [blue[i] for i in order] == sorted(blue[1:], reverse=True) and blue[0] == 255
    words = f"{PROMPT[5]} {losses[5] / math.log(2):.2f} bits"
    assert characters.nth(5).get_attribute("aria-label") == words
    mean = sum(losses[1:]) / len(losses[1:])
    expected = [mean, mean / math.log(2)]
    assert numbers(page.locator("#loss").inner_text()) == pytest.approx(expected, abs=1e-3)


def test_alternatives_branch_the_text_and_undo_brings_it_back(models, open_page):
    page = open_page(models["gpt"])
    logits = page.evaluate("(text) => explorer.logits(explorer.models[0], text)", PROMPT[:5])
    best = torch.tensor(logits).softmax(0).topk(10)
    page.locator(".character").nth(5).hover()
    page.wait_for_function("state.position === 5")
    names, shares = zip(*rows(page, "#alternatives button"), strict=True)
    assert [*names[:10]] == [shown(LETTERS[i]) for i in best.indices] and PROMPT[5] in names
    shares = numbers(" ".join(shares[:10]))
    assert shares == pytest.approx((100 * best.values).tolist(), abs=0.06)
    page.locator("#alternatives button").nth(3).click()
    assert text_of(page) == PROMPT[:5] + LETTERS[best.indices[3]]
    page.click("#text-panel .undo")
    assert text_of(page) == PROMPT
    page.locator(".character").first.click()
    assert page.locator("#no-alternatives").is_visible()
    assert rows(page, "#alternatives button") == []


def test_generation_follows_the_seed_and_the_sliders(models, open_page):
    page = open_page(models["gpt"])
    added = []
    for seed in ("1", "2", "1"):
        page.fill("#seed", seed)
        for _ in range(6):
            before, marked = text_of(page), page.locator("#next-bars .chosen bdi").inner_text()
            page.click("#next")
            page.wait_for_function("(before) => state.text !== before", arg=before)
            assert shown(text_of(page)[-1]) == marked
        added.append(text_of(page)[len(PROMPT) :])
        for _ in range(6):
            page.click("#generate-panel .undo")
        assert text_of(page) == PROMPT
    assert added[0] == added[2] != added[1]
    how = {"text": PROMPT, "count": 6, "seed": 1}
    assert added[0] == page.evaluate(GENERATE, how)
    page.locator("#top-k").fill("3")
    shares = rows(settled(page), "#next-bars button")
    assert len([row for row in shares if row[1] != "0.0%"]) == 3
    page.locator("#temperature").fill("0")
    assert [row[1] for row in rows(settled(page), "#next-bars button")][:2] == ["100.0%", "0.0%"]
    page.click("#play")
    page.wait_for_function("state.text.length > 20")
    page.click("#play")
    greedy = page.evaluate(GENERATE, {"text": PROMPT, "count": 4, "temperature": 0})
    assert text_of(page).startswith(PROMPT + greedy)
    page.click("#generate-panel .undo")
    assert text_of(page) == PROMPT


def test_switches_change_the_loss(models, open_page):
    page = open_page(models["gpt"])
    loss, seen = page.locator("#loss"), set()
    whole, _ = numbers(loss.inner_text())
    parts = set(page.evaluate("explorer.models[0].parts"))
    assert {*page.locator(".switch").evaluate_all("all => all.map(x => x.dataset.parts)")} == parts
    for part in parts:
        switch = page.locator(f'.switch[data-parts="{part}"]').first
        switch.click()
        assert switch.get_attribute("aria-checked") == "false"
        now, _, change = numbers(settled(page).locator("#loss").inner_text())
        assert now - whole == pytest.approx(change, abs=2e-3)
        seen.add(now)
        page.click("#reset")
        assert numbers(settled(page).locator("#loss").inner_text())[0] == whole
    assert len(seen) == len(parts) and page.locator("#reset").is_disabled()
    page.evaluate("explorer.off(explorer.models[0], 'blocks.1.feed_forward')")
    assert page.locator(".unit.struck").inner_text().startswith("feed_forward")


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_explained(name, models, open_page):
    page = open_page(models[name])
    steps = page.locator(".step").all()
    assert len(steps) >= len(models[name][0]["steps"])
    for step in steps:
        step.click()
        value = settled(page).locator("#cell").inner_text().split(": ")[-1]
        found = rows(page, "#explanation tr")
        assert found[-1][-1] == value, found
        if found[-1][0] == "total":
            terms = sum(sum(numbers(row[-1])) for row in found[:-1])
            assert terms == pytest.approx(numbers(value)[0], abs=0.01)
        assert re.match(rf"{name}\.py, line \d+:  \S", page.locator("#line").inner_text())


def test_attention_lens_and_head_scores(models, open_page):
    page = open_page(models["gpt"])
    page.locator("#scores tr").nth(4).click()
    chosen = page.locator("#thumbnails [aria-pressed=true]")
    assert chosen.get_attribute("aria-label") == "Layer 1, head 1"
    trace = page.evaluate(TRACE, PROMPT)
    weights = torch.tensor(trace["attention"][1][1])
    previous = weights.diagonal(-1).mean().item()
    page.wait_for_function("!document.querySelector('#scores').textContent.includes('…')")
    assert rows(page, "#scores tr")[4][2] == f"{100 * previous:.1f}%"
    for view in ("raw", "masked", "weights"):
        page.check(f"[name=view][value={view}]")
        page.focus("#map canvas")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
        assert re.match(r"Query \d+ .*, key \d+ .*: ", page.locator("#pair").inner_text())
    query, key = page.evaluate("[state.position, keyPosition]")
    assert (query, key) == (len(PROMPT) - 4, 3)
    page.keyboard.press("Enter")
    assert rows(settled(page), "#explanation tr")[-1][-1] == f"{weights[query, key]:.3f}"
    page.locator("#characters .character").first.click()  # that key is in its future
    assert rows(settled(page), "#explanation tr")[-1][-1] == "1.000"
    page.locator("#characters .character").nth(query).click()
    find = "all => Math.max(...all.map(each => each.getAttribute('stroke-width')))"
    thickest = page.locator("#arcs path").evaluate_all(find)
    assert thickest == pytest.approx(7 * weights[query].max().item(), abs=0.01)
    lens = [LETTERS[i] for i in torch.tensor(trace["lens"]).argmax(-1).flatten()]
    assert page.locator("#lens td").all_inner_texts() == [*map(shown, lens)]
    right = sum(a == b for a, b in zip(lens, 3 * (PROMPT[1:] + "\0"), strict=True))
    assert page.locator("#lens td.right").count() == right


def test_panels_that_a_model_lacks_are_absent(models, open_page):
    page = open_page(models["bigram"], models["gpt"])
    absent = "#attention-panel, #heads-panel, #lens-panel, #switches, #reset"
    assert page.locator(absent).filter(visible=True).count() == 0
    assert page.locator("section:visible").count() == 4
    page.select_option("#model-choice", "1")
    assert settled(page).locator(absent).filter(visible=True).count() == 5
    assert open_page(models["bigram"]).locator("section:visible").count() == 3


def test_runs_side_by_side(models, open_page):
    text = 3 * PROMPT  # longer than both contexts
    page = open_page(models["gpt"], models["modern_gpt"], text=text)
    assert "Only the last 16 characters are shown" in page.locator("#cut").inner_text()
    first, second, difference = numbers(page.locator("#totals").inner_text())
    assert first - second == pytest.approx(difference, abs=0.11)
    assert page.locator("#differences .character").count() == len(text)
    page.select_option("#other-choice", "0")
    assert settled(page).locator("#totals").inner_text().endswith("Difference: 0.0 bits.")
    page.click("#continue")
    page.wait_for_function("all('article b').every(each => each.textContent.length === 100)")
    wanted = page.evaluate(GENERATE, {"text": text, "count": 100, "seed": 1})
    assert page.locator("article b").last.text_content() == wanted


def test_by_keyboard(models, open_page):
    page = open_page(models["gpt"])
    page.locator(".character").nth(3).click()
    keys = {"ArrowRight": 4, "ArrowDown": 5, "ArrowLeft": 4, "End": 15, "Home": 0}
    for key, position in keys.items():
        page.keyboard.press(key)
        chosen = page.locator("[role=option][aria-selected=true]")
        assert chosen.get_attribute("data-i") == str(position)
    assert page.locator("#characters [tabindex='0'], #lens [tabindex='0']").count() == 2
    page.focus("#lens [tabindex='0']")
    page.keyboard.press("ArrowDown")
    assert page.locator("#lens-cell").inner_text().startswith("blocks.0, position 1 ")
    page.focus("#arcs")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.position") == 1
    page.press('.switch[data-parts="skips"]', "Space")
    assert "1 part off" in settled(page).locator("#loss").inner_text()
    stops = page.locator("button:visible, input:visible, select:visible, [tabindex='0']")
    named = "x => x.ariaLabel || x.getAttribute('aria-labelledby') || x.labels?.length"
    unnamed = f"all => all.filter(x => !(({named})(x) || x.innerText.trim())).length"
    assert stops.count() > 60 and stops.evaluate_all(unnamed) == 0


def test_hostile_names_and_characters(open_page):
    name = "</script><script>alert(1)</script> \"'&amp; אב \u2028"
    vocabulary = "".join(sorted(set(HOSTILE)))
    packed = [model(stage, name, vocabulary) for stage in ("gpt", "modern_gpt")]
    page = open_page(*packed, text="<b>é😀א\u0301\u2028" + "Z\u0302")
    assert page.locator("#title").inner_text().startswith("Explore </script><script>alert(1)")
    assert text_of(page) == "<>é😀א\u0301\u2028"
    message = re.sub("[\u2068\u2069]", "", page.locator("#message").inner_text())
    assert message == "Left out “b” “Z” “◌\u0302”: not in the vocabulary."
    characters = page.locator("#characters .character").all_inner_texts()
    assert characters == ["<", ">", "é", "😀", "א", "◌\u0301", "U+2028"]
    bidi = "all => all.map(each => getComputedStyle(each).unicodeBidi)"
    alone = page.locator("#characters *, #differences *, .bars bdi, #lens bdi")
    assert {*alone.evaluate_all(bidi)} == {"isolate"}
    with pytest.raises(Exception, match="does not know Z"):
        page.evaluate(TRACE, "Z")
    page.fill("#input", "")
    assert "at least two characters" in settled(page).locator("#loss").inner_text()
    page.click("#next")
    page.wait_for_function("state.text !== ''")
    assert text_of(page) in vocabulary


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 846, 1024, 1440])
def test_the_page_is_readable_and_fits_the_screen(width, scheme, models, open_page):
    page = open_page(models["gpt"], models["bigram"], width=width, color_scheme=scheme)
    places = "all => all.map(each => each.offsetTop)"
    before = page.locator("h2").evaluate_all(places)
    for off in ("", "blocks.0.attention", "norms"):
        if off:
            page.locator(f'.switch[data-parts="{off}"]').first.click()
        texts = settled(page).evaluate(TEXTS)
        assert len(texts) > 200 and min(contrast(*colors) for _, *colors in texts) >= 4.5
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator(".character").first.click()
        page.locator(".step").first.click()
        assert settled(page).locator("h2").evaluate_all(places) == before  # nothing moves
