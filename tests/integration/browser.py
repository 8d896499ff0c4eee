"""Headless Chromium, driven as a person would drive it, and what it said and asked for meanwhile."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
QUIET = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync")
SECONDS = 60


class Browser:
    """One tab."""

    def __init__(self, chrome: webdriver.Chrome):
        self.chrome = chrome

    def open(self, url: str, *, width: int = 1200, height: int = 900, **media: str) -> None:
        """Load `url` in a viewport; `media` as in `color_scheme="dark"`. Everything said so far is forgotten."""
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.chrome.get("about:blank")
        self.console()
        self.requested()
        self.chrome.get(url)

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector."""
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What an element says, spaces kept."""
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def js(self, script: str, *arguments: object) -> object:
        """The result of a script in the page."""
        return self.chrome.execute_script(script, *arguments)

    def fill(self, selector: str, value: object) -> None:
        """Type over what is in a field."""
        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(str(value) if value != "" else Keys.DELETE)

    def press(self, *keys: str) -> None:
        """Keys, wherever the focus is."""
        self.chrome.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """The focused element's id, or its tag where it has none."""
        return self.js("const e = document.activeElement; return e.id || e.tagName.toLowerCase()")

    def until(self, question: Callable[[], object]) -> None:
        """Wait for `question()` to come true."""
        end = time.monotonic() + SECONDS
        while not question():
            assert time.monotonic() < end, (self.text("#status"), self.text("#error"), self.console())
            time.sleep(0.02)

    def console(self) -> list[str]:
        """What the console got since the last time: errors, refused content, failed requests."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def requested(self) -> list[str]:
        """The addresses that were asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@contextmanager
def browsing() -> Iterator[Browser]:
    """A fresh Chromium with nothing remembered."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, *QUIET):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()
