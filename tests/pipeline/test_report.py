"""report.html in a browser: what it shows, its search, names and CSV; names of files and classes that are code."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.browser import chromium
from helpers.commands import one_line, sssd
from helpers.images import picture, write
from helpers.runs import made_run
from sssd_zoo.data.sources import SAMPLE_NAME
from sssd_zoo.models.networks import load_network

ODD = [
    "<img src=x onerror=alert(1)>.png",
    "</title><script>alert(1)<",
    "a\u202egnp.exe.png",
    "line\nbreak.png",
    "quote\"'`{{7*7}}.png",
    "emoji 🐱 ünï.png",
    "50%_off #1?&amp;.png",
]
VERDICT = {"level": "weak", "sentence": "The images are <b>few</b>.", "next": ["sssd fit --data '<x>' --out RUN"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images with odd names, two copies, a dark one and one of one colour."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, name in enumerate(ODD):
        folder, _, last = name.rpartition("/")
        write(root / "cam" / folder / (last if last.endswith(".png") else last + ".png"), picture(number, 48))
    for number in range(40):
        write(root / f"IMG_{number:02}.png", picture(100 + number, 48))
    shutil.copy(root / "IMG_03.png", root / "copy of IMG_03.png")
    write(root / "dark.png", Image.fromarray(np.asarray(picture(7, 48)) // 20))
    write(root / "grey.png", Image.new("RGB", (48, 48), (120, 120, 120)))
    return root


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory) -> Path:
    label_free = {"rank_me": 12.5, "exit_agreement_1": 0.6, "clustered_rank_me": 3.5, "<i>": 1.0}
    out = made_run(tmp_path_factory.mktemp("made") / "run", photos, verdict=VERDICT, label_free=label_free)
    assert sssd("report", out, "--device", "cpu") == 0
    return out


def data_of(page: Path) -> Any:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_the_page_has_what_a_reader_looks_for(made):
    page, data = (made / "report.html").read_text(), data_of(made / "report.html")
    assert page.index("The images are") < page.index("Cost of each exit") < page.index('id="clusters"')
    for words in ("Effective rank (RankMe)", "sssd rename", "Feature distance, unweighted", "4 clusters of 12 to 13"):
        assert words in page
    assert not re.findall(r"""(?:src|href)=["']?https?:""", page)
    names = data["images"]["name"]
    assert len(names) == data["total"] == 50
    assert [[names[image] for image in group] for group in data["copies"]] == [["IMG_03.png", "copy of IMG_03.png"]]
    assert [names[image] for image in data["dark"]] == ["dark.png"]
    assert [names[image] for image in data["constant"]] == ["grey.png"]
    ordered = list(zip(data["images"]["cluster"], data["images"]["distance"], strict=True))
    assert ordered == sorted(ordered)
    assert data["images"]["distance"][data["outliers"][0]] == max(data["images"]["distance"])


def test_names_are_never_code(made):
    page = (made / "report.html").read_text()
    assert "<img src=x" not in page
    assert page.count("<script") == 2
    assert "<b>few" not in page
    assert "<i>" not in page
    assert "\u202e" not in page
    assert "49.png" not in page, "{{7*7}} is no template"


def test_a_sample_is_said_to_be_one(photos, tmp_path):
    out = made_run(tmp_path / "run", photos)
    assert sssd("report", out, "--device", "cpu", "--images", "8") == 0
    page, data = (out / "report.html").read_text(), data_of(out / "report.html")
    shown = len(data["images"]["row"])
    assert 8 < shown < 50, "outliers and copies come to the sample"
    assert f"{shown} of 50 images are shown" in page
    assert "verdict" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_runs_and_data_that_do_not_fit(made, photos, folder_of_images, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    copy = shutil.copytree(made, tmp_path / "run")
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace(str(photos), str(tmp_path / "gone")))
    before = (copy / "report.html").read_bytes()
    for words in (("report", copy), ("clusters", copy, "--out", tmp_path / "clusters")):
        assert sssd(*words) == 2
        assert "gone" in (said := one_line(capsys))
        assert "moved, say where they are by --data" in said
    assert sssd("report", copy, "--data", folder_of_images) == 2
    assert "other data" in one_line(capsys)
    assert (copy / "report.html").read_bytes() == before
    assert sssd("report", copy, "--data", moved, "--device", "cpu") == 0
    for run in (photos, made / "model", tmp_path / "none"):
        assert sssd("report", run) == 2
        assert "not a finished run" in one_line(capsys)


class Page:
    """The page in a browser.

    Args:
        browser: of `chromium`.
        path: of the page.
    """

    def __init__(self, browser: Any, path: Path) -> None:
        self.browser = browser
        browser.get(f"file://{path}")

    def js(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def type(self, selector: str, words: str) -> None:
        script = "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        self.browser.execute_script(script + "e.dispatchEvent(new Event('input'))", selector, words)

    def cards(self) -> list[int]:
        return list(self.js("return [...document.querySelectorAll('#list .cluster')].map((e) => +e.dataset.cluster)"))

    def thumbs(self) -> int:
        return int(self.js("return document.querySelectorAll('#list .thumb').length"))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.slow
def test_a_reader_searches_and_looks_closer(made, browser):
    page = Page(browser, made / "report.html")
    assert page.cards() == [0, 1, 2, 3]
    assert page.thumbs() == 50
    page.type("#search", "2")
    assert page.cards() == [0, 1, 2, 3], "the cluster of this number, and files with it in their names"
    page.type("#search", "cluster 2")
    assert page.cards() == [2]
    page.type("#search", "COPY OF")
    assert page.thumbs() == 1
    page.type("#search", "no such thing")
    assert page.cards() == []
    assert "Nothing is called" in page.js("return document.querySelector('#found').textContent")
    page.type("#search", "")
    page.js("document.querySelector('#list .thumb').click()")
    name = "return document.querySelector('#zoom-name').textContent"
    first = page.js(name)
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.js(name) != first
    assert page.js("return document.querySelectorAll('#zoom-near .thumb').length") == 8
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.js("return document.querySelector('#zoom').open") is False
    assert page.errors() == []


@pytest.mark.slow
def test_a_reader_names_clusters_and_the_network_answers_so(made, photos, browser, tmp_path, capsys):
    copy = shutil.copytree(made, tmp_path / "run")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    page = Page(browser, copy / "report.html")
    for cluster in (0, 2):
        page.js(f"document.querySelector('[data-cluster=\"{cluster}\"] input[type=checkbox]').click()")
    page.type("#common", 'cats, "big"; ünï')
    page.js("document.querySelector('#merge [type=submit]').click()")
    page.type('[data-cluster="3"] .name', "dogs")
    state = page.js("return document.querySelector('#state').textContent")
    assert state == "3 of 4 clusters named; the network gives 3 answers, not saved yet"
    page.browser.refresh()
    assert page.js("return document.querySelector('[data-cluster=\"2\"] .name').value") == 'cats, "big"; ünï'
    page.js("document.querySelector('#save').click()")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: (downloads / "NAMES.csv").is_file())
    assert sssd("rename", copy, downloads / "NAMES.csv") == 0
    names = ['cats, "big"; ünï', "cluster 1", 'cats, "big"; ünï', "dogs"]
    assert load_network(str(copy)).pretrained_cfg["label_names"] == names
    assert sssd("report", copy, "--device", "cpu") == 0
    page = Page(browser, copy / "report.html")
    assert page.js("return document.querySelector('[data-cluster=\"2\"] .name').value") == names[2]
    assert page.errors() == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width, scheme, made, browser):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page = Page(browser, made / "report.html")
    assert page.js("return document.documentElement.scrollWidth") <= width
    page.js("document.querySelector('#list .thumb').click()")
    assert page.js("return document.querySelector('#zoom').getBoundingClientRect().right") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_labelled_images_have_purities_and_no_names_to_give(folder_of_images, browser, tmp_path):
    accuracy = [{"name": "<SSSD>", "exits": [40.0, 50.0, 60.0, 70.0], "ensemble": 71.0}]
    out = made_run(tmp_path / "run", folder_of_images, unlabelled=False, accuracy=accuracy)
    assert sssd("report", out, "--device", "cpu") == 0
    page = Page(browser, out / "report.html")
    assert "33%" in page.js("return document.querySelector('.cluster .facts').textContent")
    assert page.js("return document.querySelector('#naming')") is None
    page.type("#search", "green")
    assert page.thumbs() >= 16
    assert "&lt;SSSD&gt;" in (out / "report.html").read_text()
    assert page.errors() == []


@pytest.mark.slow
def test_ten_thousand_images_open_at_once(browser, tmp_path):
    out = made_run(tmp_path / "run", SAMPLE_NAME, clusters=200)
    assert sssd("report", out, "--device", "cpu") == 0
    assert data_of(out / "report.html")["total"] == 10_000
    assert (out / "report.html").stat().st_size < 15e6
    # The time that the page itself takes, not what other programs of a busy machine take from it.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = Page(browser, out / "report.html")
    assert page.thumbs() == 24 * 24
    measured = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    assert next(each["value"] for each in measured if each["name"] == "TaskDuration") < 3
    page.type("#search", "row 1234")
    assert page.thumbs() == 1
