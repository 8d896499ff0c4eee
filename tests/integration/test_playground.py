"""The playground in a real browser: it writes, compares, stops, explains, and asks nobody but its own server."""

import re
import time
import warnings
from pathlib import Path

import pytest
from serving import serving, tiny_core

pytest.importorskip("selenium", reason="selenium is not installed: the playground is NOT tested")
from browser import BROWSER, DRIVER, browsing
from selenium.webdriver.common.keys import Keys

from dspark.server import playground
from dspark.server.service import ServerConfig

MISSING = "chromium or chromedriver is not installed: the playground is NOT tested"
if not (BROWSER and DRIVER):
    warnings.warn(MISSING, stacklevel=1)
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)
FOCUS_ORDER = ["prompt", "temperature", "tokens", "seed", "format", "order", "run", "summary", "pre", "pre", "others"]
FILES = Path(playground.__file__).parent


@pytest.fixture(scope="module")
def served(tiny_pair):
    with serving(tiny_core(tiny_pair), ServerConfig(name="tiny", most_prompt_tokens=120)) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with browsing() as one:
        yield one


@pytest.fixture
def page(served, browser):
    """The page, loaded; afterwards nothing may have gone wrong in it, or been asked of others."""
    browser.open(served.url)
    browser.until(lambda: "tiny" in browser.text("#model"))
    yield browser
    assert browser.console() == []
    asked = [url for url in browser.requested() if not url.startswith("about:")]
    assert asked and all(url.startswith(served.url + "/") for url in asked)


def run(page, **fields):
    """Fill in the form, run, and wait for the end."""
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.find("#run").click()
    page.until(lambda: page.text("#status").startswith("Done") or page.find("#error").is_displayed())


@needs_browser
def test_both_columns_fill_with_the_same_text(page, served):
    run(page, prompt="def add(a, b):", temperature=0.7, tokens=60, seed=5)
    asked = {"prompt": "def add(a, b):", "temperature": 0.7, "max_tokens": 60, "seed": 5, "dspark": {"trace": True}}
    told = served.http.post("/v1/completions", json=asked).json()["choices"][0]
    for column in ("#speculative pre", "#ordinary pre"):
        assert page.text(column) == "def add(a, b):" + told["text"]
    kinds = page.js("return [...document.querySelectorAll('#speculative pre > span')].map(s => s.className)")
    assert kinds[1:] == [token["kind"] for token in told["dspark"]["tokens"]] and "accepted" in kinds
    assert set(page.js("return [...document.querySelectorAll('#ordinary pre > span')].map(s => s.className)")[1:]) == {
        "plain"
    }
    assert (
        page.text("#same") == "yes" and "same text: yes" in page.text("#status") and "Seed 5." in page.text("#status")
    )
    assert re.fullmatch(r"\d+\.\d×", page.text("#speedup"))
    assert page.text("#tau") == f"{told['dspark']['tokens_per_round']:.2f}"
    assert page.text("#speculative .facts").startswith(f"60 tokens in {told['dspark']['rounds']} rounds")
    assert int(page.text("#ordinary .speed b")) > 0
    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    colours = {kind: page.js(colour, f"#speculative pre > .{kind}") for kind in ("accepted", "corrected", "plain")}
    assert len(set(colours.values())) == 3


@needs_browser
@pytest.mark.parametrize(
    ("order", "kind"), [("both at once", "text to go on"), ("in turn (fair times)", "a chat message")]
)
def test_other_orders_and_chats(page, order, kind):
    run(page, order=order, format=kind, prompt="add", temperature=0, tokens=30, seed="")
    assert page.text("#same") == "yes" and page.text("#speculative pre") == page.text("#ordinary pre") != "add"


@needs_browser
def test_texts_that_differ_are_not_called_the_same(page, served, monkeypatch):
    make = served.core.intake.request

    def other(prompt, params):
        request = make(prompt, params)
        request.seed += params.speculation == "off"
        return request

    monkeypatch.setattr(served.core.intake, "request", other)
    run(page, prompt="def", temperature=1, tokens=20, seed=1)
    place = int(re.fullmatch(r"no, from token (\d+)", page.text("#same"))[1])
    for column in ("#speculative", "#ordinary"):
        spans = page.js(f"return [...document.querySelectorAll('{column} pre > span')].map(s => s.className)")
        assert [i for i, kinds in enumerate(spans) if "differs" in kinds] == [place]


@needs_browser
def test_keyboard_alone(page):
    seen = []
    for _ in FOCUS_ORDER:
        page.press(Keys.TAB)
        seen.append(page.focused())
        assert page.js("return getComputedStyle(document.activeElement).outlineStyle") != "none", seen
    assert seen == FOCUS_ORDER
    page.find("#prompt").send_keys(Keys.CONTROL, "a")
    page.press("class Stack:")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("Done"))
    page.js("document.querySelector('#speculative pre').focus()")
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: "no draft was checked" in page.text("#tip"))
    words = {
        "accepted": r"draft place \d, confidence \d+ %, accepted",
        "corrected": r"in place of the draft \".+confidence",
    }
    for _ in range(12):
        page.press(Keys.ARROW_RIGHT)
        page.until(lambda: page.find("#tip").is_displayed())
        kind = page.js("return document.querySelector('.current').className.split(' ')[0]")
        if kind in words:
            assert re.search(words.pop(kind), page.text("#tip"))
    assert "corrected" not in words
    page.press(Keys.TAB)
    assert not page.find("#tip").is_displayed()


@needs_browser
def test_stop_frees_the_server(page, served, monkeypatch):
    step = served.core.step

    def slow():
        time.sleep(0.03)
        return step()

    monkeypatch.setattr(served.core, "step", slow)
    before = served.service.metrics._cancelled._value.get()
    page.fill("#tokens", 400)
    for stop in (lambda: page.press(Keys.ESCAPE), lambda: page.find("#stop").click()):
        page.find("#run").click()
        page.until(lambda: "tokens in" in page.text("#speculative .facts"))
        stop()
        page.until(lambda: page.text("#status") == "Stopped.")
        served.until(lambda: served.core.idle)
        assert re.fullmatch(r"\d+ tokens, stopped", page.text("#speculative .facts"))
        assert page.find("#run").is_enabled() and not page.find("#stop").is_enabled()
    served.until(lambda: served.service.metrics._cancelled._value.get() == before + 2)


@needs_browser
def test_what_is_typed_stays_text(page):
    prompt = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    run(page, prompt=prompt, tokens=5)
    assert page.text("#speculative pre").startswith(prompt)
    assert page.js("return document.querySelectorAll('img, pre script').length") == 0
    assert page.js("return document.title") == "dspark playground"


@needs_browser
@pytest.mark.parametrize("media", [{}, {"color_scheme": "dark", "reduced_motion": "reduce"}])
def test_narrow_screens_and_contrast(page, served, media):
    page.open(served.url, width=360, height=740, **media)
    run(page, prompt="x" * 90, tokens=40, temperature=0.7, seed=2)
    page.find("summary").click()
    inner, wide, seen = page.js("const e = document.documentElement; return [innerWidth, e.scrollWidth, e.clientWidth]")
    assert inner == 360 and wide == seen
    for selector in ("#model", "#run", "dd", "dt", ".sample.accepted", ".sample.corrected", ".sample.bonus", "#scale"):
        assert contrast(page, selector) >= 4.5, selector
    dark = page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    moves = page.js("return getComputedStyle(document.querySelector('#run')).transitionDuration") != "0s"
    assert (dark, moves) == (bool(media), not media)


def contrast(page, selector):
    """WCAG's ratio of an element's text to what lies behind it."""
    script = """const found = [getComputedStyle(document.querySelector(arguments[0])).color];
    for (let e = document.querySelector(arguments[0]); e; e = e.parentElement)
      found.push(getComputedStyle(e).backgroundColor);
    return found"""
    layers = [[float(x) for x in re.findall(r"[\d.]+", colour)] for colour in page.js(script, selector)]
    behind = [255.0] * 3
    for *colour, alpha in (layer if len(layer) == 4 else [*layer, 1.0] for layer in reversed(layers[1:])):
        behind = [alpha * new + (1 - alpha) * old for new, old in zip(colour, behind, strict=True)]
    dim, bright = sorted(luminance(colour) for colour in (layers[0][:3], behind))
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_browser
def test_the_load_is_live(page, served):
    page.fill("#tokens", 400)
    page.fill("#others", 3)
    page.press(Keys.TAB)
    page.until(lambda: page.text("#running") == "3" and page.text("#throughput") not in ("–", "0"))
    page.until(lambda: re.fullmatch(r"\d+\.\d", page.text("#budget")) and page.text("#share") == "100 %")
    page.until(lambda: " " in (page.find("#line").get_attribute("points") or ""))  # two seconds make a line
    page.fill("#others", 0)
    page.press(Keys.TAB)
    page.until(lambda: page.text("#running") == "0")
    assert served.core.idle


@needs_browser
def test_errors_are_messages(page):
    run(page, prompt="x = 1\n" * 40)
    assert re.fullmatch(r"the prompt has \d+ tokens, at most 120 fit; shorten it", page.find("#error").text)
    page.console()  # the browser itself notes every answer of 400
    page.fill("#temperature", 9)
    page.find("#run").click()
    assert page.js("return document.querySelector('#temperature').validity.rangeOverflow")
    run(page, prompt="x = 1", temperature=0, tokens=4)
    assert not page.find("#error").is_displayed() and page.text("#same") == "yes"


@needs_browser
def test_a_key_is_asked_for_and_kept_in_the_tab(tiny_pair, browser):
    with serving(tiny_core(tiny_pair), ServerConfig(name="locked", keys=("open-sesame",)), key="open-sesame") as served:
        browser.open(served.url)
        browser.until(lambda: browser.focused() == "key")
        assert "API key" in browser.text("#error") and browser.text("#model").strip() == ""
        browser.press("open-sesame", Keys.TAB)
        browser.until(lambda: "locked" in browser.text("#model"))
        run(browser, tokens=4)
        assert browser.text("#same") == "yes" and not browser.find("#error").is_displayed()
        assert browser.js("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        browser.chrome.refresh()
        browser.until(lambda: "locked" in browser.text("#model"))


def test_the_page_is_served_under_its_policy(served):
    for path in playground.PATHS:
        answer = served.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == playground.POLICY
    assert served.http.head("/").headers["content-type"] == "text/html; charset=utf-8"
    assert {path.name for path in FILES.iterdir() if path.suffix in (".js", ".css", ".svg", ".html")} == set(
        playground.NAMES
    )


def test_nothing_in_the_page_makes_markup_of_text():
    source = "".join((FILES / name).read_text(encoding="utf-8") for name in playground.NAMES)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son[a-z]+=|style=|https?://(?!www\.w3\.org/2000/svg)",
        source,
    )


def test_keys_leave_the_page_open_and_it_can_be_left_out(tiny_pair):
    with serving(tiny_core(tiny_pair), ServerConfig(keys=("secret",))) as served:
        assert served.http.get("/").status_code == 200
        assert served.http.get("/v1/models").status_code == 401
        assert served.http.get("/playground/../v1/models").status_code == 401
    with serving(tiny_core(tiny_pair), ServerConfig(playground=False)) as served:
        assert served.http.get("/").status_code == 404 and served.http.get("/playground/page.js").status_code == 404
