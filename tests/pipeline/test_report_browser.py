"""The page of `asvr report` in a real browser, made of names and texts that somebody wrote with bad intentions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_report
import pytest
from browser import chromium, complaints, requests, show
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from manifests.reader import open_manifest
from pipeline import cli
from pipeline.console import plain
from pipeline.report.colours import code_colours
from pipeline.report.page import LONGEST_TEXT

SETUP = Path(__file__).parents[2] / "docker" / "browser.sh"
NAMES = [made_report.harmless_name(text) for text in made_report.HOSTILE[:-1]] + made_report.HOSTILE[-1:]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as found:
        yield found


def answers(seed: int) -> list[dict[str, Any]]:
    texts = made_report.HOSTILE
    return [
        {"image": name, "question": text, "expected": "yes", "answer": texts[n - seed], "correct": n % 3 != seed}
        for n, (name, text) in enumerate(zip(NAMES, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs side by side, whose token set has 16 images; one run's folder has a bad name too."""
    folder = tmp_path_factory.mktemp("report")
    made_report.save_set(folder / "tokens", folder / "images", 16, names=NAMES)
    runs = [folder / "<b onclick='window.hurt=1'>", folder / "other"]
    for seed, run in enumerate(runs):
        made_report.save_run(run, folder / "tokens", seed=seed, answers=answers(seed))
    assert cli.run(["report", str(runs[0]), "--with", str(runs[1])]) == 0
    return runs[0] / "report.html"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set of 1,000 images."""
    folder = tmp_path_factory.mktemp("thousand")
    made_report.save_set(folder / "tokens", folder / "images", 1000)
    assert cli.run(["report", str(folder / "tokens"), "--images", "1000"]) == 0
    return folder / "tokens" / "report.html"


def run_all_over(browser: webdriver.Chrome) -> None:
    """Bring everything into view once, and open all that opens."""
    browser.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    for _ in range(40):
        browser.execute_script("scrollBy({top: innerHeight, behavior: 'instant'})")
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 20))")
        if browser.execute_script("return scrollY + innerHeight >= document.documentElement.scrollHeight - 2"):
            break


@pytest.mark.parametrize("width", [375, 1280])
def test_it_loads_nothing_complains_of_nothing_and_fits(browser: webdriver.Chrome, page: Path, width: int) -> None:
    show(browser, page, width)
    run_all_over(browser)
    for button in browser.find_elements(By.CSS_SELECTOR, ".explore")[:3]:
        browser.execute_script("arguments[0].click()", button)
        WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.ID, "explorer").get_attribute("open"))
        assert browser.execute_script(
            "const d = document.getElementById('explorer'); return d.scrollWidth <= d.clientWidth"
        )
        browser.find_element(By.ID, "explorer-close").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert complaints(browser) == []
    assert requests(browser) == [page.resolve().as_uri()]
    assert browser.execute_script("return window.hurt === undefined")


def test_hostile_texts_are_shown_and_do_nothing(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.card h3')].map((title) => title.textContent)"
    )
    assert {plain(name, LONGEST_TEXT) for name in NAMES} <= set(shown)
    text = browser.execute_script("return document.body.textContent")
    for hostile in made_report.HOSTILE:
        assert text.count(plain(hostile, LONGEST_TEXT)) >= 3, "as a caption, a question and a reject's message"
    made = browser.execute_script("return [...document.querySelectorAll('*')].map((one) => one.localName)")
    assert made.count("script") == 2, "the page's own, and its data"
    assert made.count("b") == browser.execute_script(
        "return document.querySelectorAll('li > b, .text > b, li > span > b').length"
    )
    with_handlers = "return [...document.querySelectorAll('*')].flatMap((one) => [...one.attributes]).filter((a) => a.name.startsWith('on') || /^\\s*javascript:/i.test(a.value) && a.name === 'href').length"
    assert browser.execute_script(with_handlers) == 0
    assert max(map(len, shown)) < LONGEST_TEXT + 60, "10 kB names are shortened"


def test_the_policy_refuses_what_would_get_past_the_escaping(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.hurt=1\">')")
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hurt=2'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/'; document.body.append(i);"
    )
    said: list[str] = []

    def refused(_: object) -> bool:
        said.extend(one for one in complaints(browser) if "Content Security Policy" in one)
        return len(said) >= 3

    WebDriverWait(browser, 20).until(refused)
    assert browser.execute_script("return window.hurt === undefined")


def test_the_same_code_has_the_same_colour(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)
    run_all_over(browser)
    opened = open_manifest(page.parents[1] / "tokens")
    colours = [code_colours(book) for book in opened.codebooks()]
    pixels = browser.execute_script(
        "return [...document.querySelectorAll('.card')].map((card) => [card.querySelector('h3').textContent, "
        "[...card.querySelectorAll('.maps canvas')].map((map) => "
        "[...map.getContext('2d').getImageData(0, 0, map.width, map.height).data])])"
    )
    drawn = dict(pixels)
    assert len(drawn) == 16
    ids = opened.index()["image_id"].to_pylist()
    for image_id, (codes_PD,) in zip(ids, opened.read_codes(ids), strict=True):
        maps = drawn[plain(image_id, LONGEST_TEXT)]
        assert len(maps) == len(colours)
        for depth, table in enumerate(colours):
            rgba = [value for code in codes_PD[:, depth] for value in (*table[code].tolist(), 255)]
            assert maps[depth] == rgba


def test_it_is_used_by_keyboard_alone(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    press(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    assert browser.execute_script(
        "const r = document.activeElement.getBoundingClientRect(); return r.left >= 0 && r.width > 0"
    )
    press(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "main"
    for _ in range(120):
        press(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("class") == "explore":
            break
    opener = browser.switch_to.active_element
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.ID, "explorer-said").text)
    said = browser.find_element(By.ID, "explorer-said")
    assert said.text.startswith("Row 1 of 8, column 1 of 8.")
    press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_RIGHT)
    assert said.text.startswith("Row 3 of 8, column 8 of 8.")
    opened = open_manifest(page.parents[1] / "tokens")
    title = browser.find_element(By.ID, "explorer-title").text
    (image_id,) = [name for name in opened.index()["image_id"].to_pylist() if plain(name, LONGEST_TEXT) == title]
    codes = opened.read_codes([image_id])[0][0][23]
    assert f"Codes by depth: {', '.join(map(str, codes))}." in said.text
    press(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "explorer").get_attribute("open")
    assert browser.switch_to.active_element == opener


def test_what_a_screen_reader_needs_is_there(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)
    assert browser.execute_script("return document.documentElement.lang") == "en"
    for landmark in ("header", "nav[aria-label]", "main", "footer", "h1"):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"body > {landmark}, body > header > {landmark}")) == 1, (
            landmark
        )
    levels = browser.execute_script(
        "return [...document.querySelectorAll('main h2, main h3')].map((one) => +one.localName[1])"
    )
    assert levels[0] == 2
    for problem in (
        "img:not([alt])",
        "svg[role=img]:not([aria-labelledby]):not([aria-label])",
        "section:not([aria-labelledby])",
        "th:not([scope])",
        "input:not([id])",
        "button:not([type])",
        "[style]",
    ):
        assert browser.find_elements(By.CSS_SELECTOR, problem) == [], problem
    missing = "return [...document.querySelectorAll('[aria-labelledby], [aria-describedby], label[for], a[href^=\"#\"]')].flatMap((one) => [one.getAttribute('aria-labelledby'), one.getAttribute('aria-describedby'), one.htmlFor, one.hash && one.hash.slice(1)].filter(Boolean).join(' ').split(' ')).filter((id) => !document.getElementById(id))"
    assert browser.execute_script(missing) == []
    twice = "const seen = [...document.querySelectorAll('[id]')].map((one) => one.id); return seen.filter((id, n) => seen.indexOf(id) !== n)"
    assert browser.execute_script(twice) == []


def test_the_search_field_leaves_what_has_the_text(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, 1280)
    field = browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    field.send_keys("SHAPES/")
    left = "return [...document.querySelectorAll('.card')].filter((card) => card.offsetParent).map((card) => card.querySelector('h3').textContent)"
    assert browser.execute_script(left) == [f"shapes/{number:04}.png" for number in range(4)]
    assert browser.find_element(By.CSS_SELECTOR, ".search [role=status]").text == "4 of 16 images"


def test_dark_where_the_reader_wants_it_dark(browser: webdriver.Chrome, page: Path) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    for scheme, colour in (("dark", "rgb(22, 22, 21)"), ("light", "rgb(255, 255, 255)")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        show(browser, page, 375)
        assert browser.execute_script(paper) == colour


@pytest.mark.parametrize("width", [375, 1280])
def test_a_thousand_images_are_drawn_as_they_come_into_view(
    browser: webdriver.Chrome, thousand: Path, width: int
) -> None:
    assert thousand.stat().st_size < 40 << 20
    show(browser, thousand, width)
    count = "return document.querySelectorAll('.card').length"
    assert browser.execute_script(count) == 1000
    drawn = "return document.querySelectorAll('.maps canvas').length"
    assert browser.execute_script(drawn) < 300
    browser.execute_script("document.querySelectorAll('.card')[900].scrollIntoView({behavior: 'instant'})")
    waiting = "return document.querySelectorAll('.card')[900].querySelectorAll('canvas').length"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(waiting) == len(made_report.SIZES))
    assert browser.execute_script(drawn) < 600
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert complaints(browser) == []


def test_a_missing_browser_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"^chromium or chromedriver is missing: .*browser\.sh"), chromium():
        pass
    found = subprocess.run(["/bin/sh", str(SETUP)], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert found.returncode == 9
    assert "apt-get install chromium chromium-driver" in found.stderr
    assert found.stderr.count("\n") == 1
