"""The page of `erde-hub demo` in a real browser: `make test-browser` with ERDE_HUB_CHROMIUM=/usr/bin/chromium.

Needs gradio, selenium and a chromedriver next to the browser or on the path; `.ci/run` installs them.
"""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from erde_hub.scripts import demo
from erde_hub.scripts.playground.samples import SHIPPED

CHROMIUM = os.environ.get("ERDE_HUB_CHROMIUM")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="the variable ERDE_HUB_CHROMIUM names no Chromium"),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
waiting = pytest.importorskip("selenium.webdriver.support.wait", reason="selenium is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def address():
    page = demo.import_page()
    blocks = page.build_page([demo.open_network(str(SHIPPED))])
    yield page.serve(blocks)
    blocks.close()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1100", *quiet):
        options.add_argument(f"--{flag}")
    service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
    found = webdriver.Chrome(options=options, service=service)
    found.set_script_timeout(60)
    yield found
    found.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find(".tile"))

    def find(self, css):
        return self.driver.find_elements("css selector", css)

    def wait(self, condition):
        return waiting.WebDriverWait(self.driver, 60).until(lambda _: condition())

    def text(self, css):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def press(self, css, key):
        element = self.find(css)[0]
        self.driver.execute_script("arguments[0].focus()", element)
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def exit_of_selected(self):
        return self.text(".tile[aria-pressed=true] .chip")

    def upload(self, path: Path):
        self.driver.find_element("css selector", "input[type=file]").send_keys(str(path))


@pytest.fixture
def page(driver, address):
    driver.set_window_size(1280, 1100)
    return Page(driver, address)


def test_moving_the_slider_changes_the_exit(page):
    keys = webdriver.common.keys.Keys
    assert "of 4" in page.text(".answer")
    stored = page.text(".legend")
    page.press("input[type=range]", keys.HOME)  # at 0 no image exits early
    page.wait(lambda: page.exit_of_selected() == "4")
    assert "classifier: 60" in page.text(".legend")
    assert "0 %" in page.find("table tr:nth-child(2)")[0].text
    dot = page.find("circle")[0].get_attribute("cx")
    page.press("input[type=range]", keys.END)  # and at the other end all do
    page.wait(lambda: page.exit_of_selected() == "1")
    assert "layer1: 60" in page.text(".legend")
    assert page.find("circle")[0].get_attribute("cx") < dot
    (button,) = [button for button in page.find("button") if "stored threshold" in button.text]
    button.click()
    page.wait(lambda: page.text(".legend") == stored)


def test_a_sample_is_chosen_with_the_keyboard(page):
    page.press('.tile[data-index="2"]', webdriver.common.keys.Keys.ENTER)
    page.wait(lambda: page.find('.tile[data-index="2"][aria-pressed=true]'))
    page.wait(lambda: page.driver.execute_script("return document.activeElement.dataset.index") == "2")


def test_images_are_added_and_a_broken_file_gives_a_message(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page.upload(tmp_path / "broken.png")
    page.wait(lambda: "broken.png" in page.text("#note"))
    assert "Traceback" not in page.driver.page_source
    assert len(page.find(".tile")) == 60
    Image.new("RGB", (40, 30), "white").save(tmp_path / "white.png")
    page.upload(tmp_path / "white.png")
    page.wait(lambda: len(page.find(".tile")) == 61)
    page.wait(lambda: not page.text("#note").strip())
    assert "all 61 so far" in page.text("table")


def test_pictures_of_the_test_set_open_with_the_keyboard(page):
    size = "return [...document.querySelectorAll('details img')].map(e => e.checkVisibility() && e.naturalWidth)"
    assert page.driver.execute_script(size) == [False] * 3
    page.press("details summary", webdriver.common.keys.Keys.ENTER)
    page.wait(lambda: min(page.driver.execute_script(size)) > 800)


def test_nothing_is_asked_of_another_computer(page, address):
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    names = page.driver.execute_script(script)
    assert names
    assert [name for name in names if not name.startswith(address)] == []


def test_a_narrow_screen_shows_all(page):
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.press("details summary", webdriver.common.keys.Keys.ENTER)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
        widths = [track.size["width"] for track in page.find(".exit.taken .track")]
        assert min(widths) > 60
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
