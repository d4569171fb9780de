"""The page in a real browser: no errors, tables that sort by keyboard, axes with units, nothing that axe-core finds."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM

from quantkit.evaluate.settings import Chunking
from quantkit.report.data import NamedText
from quantkit.report.ladder import Ladder, LadderOptions
from quantkit.sources.source import open_model

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
_AXE = importlib.util.find_spec("axe_playwright_python")
pytestmark = pytest.mark.skipif(
    not (_BROWSER and _DRIVER and _AXE and importlib.util.find_spec("selenium")),
    reason="Chromium, chromedriver, selenium and axe-playwright-python (for axe.min.js) are not all here",
)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
          "--disable-background-networking", "--disable-component-update", "--disable-sync",
          "--hide-scrollbars")  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("page") / "out"
    text = (ROOT / "fixtures" / "tinylm-test.txt").read_text("utf-8")
    texts = [NamedText("prose", text[:9000]), NamedText("more of it", text[-9000:])]
    options = LadderOptions(
        types=["Q8_0", "Q4_K_M", "Q2_K"], texts=texts, chunking=Chunking(n_ctx=128, chunks=4), n_prompts=2
    )
    run = Ladder(open_model(TINYLM), directory, options)
    run.quantize()
    run.measure()
    run.say()
    run.write()
    return directory / "report.html"


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, width: int, scheme: str) -> None:
    browser.set_window_size(width, 1200)
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_every_size_and_light(browser, page, width, scheme):
    show(browser, page, width, scheme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    dark = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    axe = Path(_AXE.origin).with_name("axe.min.js").read_text("utf-8")
    browser.execute_script(axe)
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    serious = [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found["violations"]
               if v["impact"] in ("serious", "critical")]  # fmt: skip
    assert serious == [] and len(found["passes"]) > 20


def test_tables_sort_by_keyboard(browser, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, page, 1400, "light")
    table = browser.find_element(By.TAG_NAME, "table")
    heads = table.find_elements(By.TAG_NAME, "th")
    column = [head.text.split(" ")[0] for head in heads].index("Size")

    def sizes() -> list[int]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        return [int(row.find_elements(By.TAG_NAME, "td")[column].get_attribute("data-value")) for row in rows]

    button = heads[column].find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    assert sizes() == sorted(sizes()) and heads[column].get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.SPACE)
    assert sizes() == sorted(sizes(), reverse=True) and heads[column].get_attribute("aria-sort") == "descending"


def test_plots_have_axes_with_units_and_text_alternatives(browser, page):
    show(browser, page, 1400, "light")
    plots = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => ({"
        "title: svg.querySelector('title').textContent, desc: svg.querySelector('desc').textContent,"
        "texts: [...svg.querySelectorAll('text')].map(t => t.textContent.trim()),"
        "caption: svg.parentNode.querySelector('figcaption').textContent}))"
    )
    report = json.loads(page.with_name("report.json").read_text("utf-8"))
    assert len(plots) == 4 + 1 + 1 + 2 * len(report["files"])
    for plot in plots:
        assert plot["title"] and len(plot["desc"]) > 20 and plot["caption"]
    sized = [plot for plot in plots if "against file size" in plot["title"]]
    assert len(sized) == 4
    for plot in sized:
        assert "file size (GiB)" in plot["texts"] and any(text.endswith("(nats)") for text in plot["texts"])
        assert {file["type"] for file in report["files"]} <= set(plot["texts"])
