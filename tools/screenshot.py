"""Take the picture of an exported page that the README shows.

    python tools/screenshot.py PAGE.html docs/page.png [--dark] [--width 1280]

It needs Playwright and Chromium, as the tests of the page do.
"""

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"


def main() -> None:
    """Open the page, write a text, select a character, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=2080)
    options = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
            reduced_motion="reduce",
        )
        page.goto(options.page.resolve().as_uri())
        page.get_by_text("This device computes").wait_for()
        page.check("#colour")
        index = page.locator("#pick").input_value()
        page.locator(f'#inside-body[data-index="{index}"]').wait_for()
        page.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
