"""The HTML page in a browser: nothing wider than a phone or a screen, nothing logged, dark where that is asked."""

import html
import json
import re
import shutil
import subprocess

import analysis_builders as build
import pytest

from nufilt_jax.analysis.pictures import draw_pictures
from nufilt_jax.analysis.report import report_page

# Chromium last: where it is a snap, it sees no temporary folder.
COMMANDS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
CHROMIUM = next((command for command in COMMANDS if shutil.which(command)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, as by apt-get install chromium")

WIDTHS = (400, 1280)
SCHEMES = {"dark": 0, "light": 1}
TASKS = ["sun397", "a-task-of-which-the-name-is-one-word-and-wider-than-a-phone-is-in-upright-hands", "dtd"]
LONG = "organisation/" + "a_model_in_one_word_" * 4
# Runs in the page around the reports, which hold no script and let none run.
MEASURE = """
const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const luminance = rgb => {
  const [r, g, b] = rgb.match(/[\\d.]+/g).map(x => linear(x / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
window.onload = () => {
  const told = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow, box = page.scrollingElement;
    const paper = luminance(view.getComputedStyle(page.documentElement).backgroundColor);
    const ink = [...page.querySelectorAll("h1, h2, p, th, td")].map(
      place => luminance(view.getComputedStyle(place).color));
    return {
      name: frame.title, width: view.innerWidth, seen: box.clientWidth, needed: box.scrollWidth,
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches, paper: paper,
      contrast: Math.min(...ink.map(x => (Math.max(x, paper) + 0.05) / (Math.min(x, paper) + 0.05))),
      pictures: [...page.images].map(image => image.naturalWidth),
      cut: [...page.images].filter(image => image.getBoundingClientRect().right > box.clientWidth).length,
    };
  });
  document.title = JSON.stringify(told);
};
"""


def look(pages, scheme, folder):
    """What a browser makes of pages: measures of each at each width, and what it logged to the console."""
    frames = "".join(
        f'<iframe title="{name}" style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(content)}">'
        "</iframe>"
        for name, content in pages.items()
        for width in WIDTHS
    )
    around = folder / "around.html"
    around.write_text(f"<!DOCTYPE html><meta charset='utf-8'><script>{MEASURE}</script>{frames}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    flags += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--dump-dom"]
    ran = subprocess.run([CHROMIUM, *flags, around.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    [title] = re.findall(r"<title>(\[.*?\])</title>", ran.stdout)
    return json.loads(html.unescape(title)), [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def reports():
    """The page with everything in it, and the one of a merge of which nothing is known."""
    document = build.random_document(TASKS, methods=("nufilt", "sum"), n_blocks=12)
    accuracy = dict(zip(TASKS, document["accuracy"]["matrix"][-1], strict=True))
    recipe = build.recipe(TASKS)
    recipe = recipe._replace(
        inputs=[(name, LONG, "f00d" * 10, sha256) for name, _, _, sha256 in recipe.inputs],
        settings={**recipe.settings, "layers": LONG},
        compared=[{"name": name, "accuracy": accuracy, "acc": 0.5, "bwt": None} for name in ("sum", LONG, "nufilt")],
    )
    empty = build.empty_document(TASKS, {"losses": f"images of {LONG} are elsewhere"})
    return {
        "everything": report_page(document, recipe, draw_pictures(document)),
        "nothing": report_page(empty, recipe._replace(compared=()), {}),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_report_fits_and_is_read(reports, scheme, tmp_path):
    measured, logged = look(reports, scheme, tmp_path)
    assert logged == []
    assert [(page["name"], page["width"]) for page in measured] == [
        (name, width) for name in ("everything", "nothing") for width in WIDTHS
    ]
    for page in measured:
        assert page["needed"] <= page["seen"], page
        assert page["cut"] == 0, page
        assert page["dark"] == (scheme == "dark") and (page["paper"] < 0.05) == page["dark"], page
        assert page["contrast"] >= 4.5, page  # WCAG 2, level AA
        assert len(page["pictures"]) == (7 if page["name"] == "everything" else 0) and all(page["pictures"])


def test_what_does_not_fit_or_is_not_allowed_is_seen(reports, tmp_path):
    spoilt = {"wide": '<div style="width: 600px">wide</div>', "told": "<script>document.title = 'ran'</script>"}
    pages = {name: reports["nothing"].replace("</body>", f"{more}</body>") for name, more in spoilt.items()}
    measured, logged = look(pages, "light", tmp_path)
    assert [page["needed"] > page["seen"] for page in measured] == [True, False, False, False]
    assert len(logged) == len(WIDTHS) and all("Content Security Policy" in line for line in logged)
