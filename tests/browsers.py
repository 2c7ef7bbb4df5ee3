"""A real browser for the tests of web pages, and checks of accessibility."""

import os
import shutil
from contextlib import contextmanager

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SWITCHES += ["--disable-component-update", "--disable-sync"]
# Texts whose colour is too close to what lies behind: below 4.5 to 1, WCAG's bound. Disabled controls are free of it.
PALE_TEXTS = """() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const pale = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (element.closest('[disabled], script, style')) continue;
    let opacity = 1, layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.unshift(numbers(getComputedStyle(e).backgroundColor));
      opacity *= getComputedStyle(e).opacity;
    }
    const ground = layers.reduce((below, top) => over(top, below), [255, 255, 255]);
    const ink = numbers(getComputedStyle(element).color);
    const lights = [luminance(over([...ink.slice(0, 3), (ink[3] ?? 1) * opacity], ground)), luminance(ground)];
    const ratio = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
    if (ratio < 4.5) pale.push(`${ratio.toFixed(1)}: ${text}`);
  }
  return pale;
}"""

# Colours fade from one scheme to the other; what turns without end is not waited for.
FADED = """() => Promise.allSettled(document.getAnimations()
  .filter((a) => Number.isFinite(a.effect.getComputedTiming().endTime)).map((a) => a.finished))"""

# Form controls and pictures without a name for those who cannot see them.
NAMELESS = """() => [...document.querySelectorAll('input, button, textarea, select')]
  .filter((e) => e.type !== 'file' && e.checkVisibility())
  .filter((e) => !(e.ariaLabel || e.title || e.innerText || [...(e.labels || [])].some((l) => l.innerText.trim())
    || e.querySelector('img')?.alt))
  .map((e) => e.outerHTML).concat([...document.images].filter((e) => !e.hasAttribute('alt')).map((e) => e.outerHTML))"""


def chromium():
    given = os.environ.get("CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser(sync_api):
    """Yield a headless Chromium; skip the test if there is none."""
    path = chromium()
    if path is None:
        pytest.skip(
            f"no browser: install chromium, or name one in the variable CHROMIUM (looked for {', '.join(NAMES)})"
        )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()
