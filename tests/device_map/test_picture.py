"""The page that draws a plan: whole by itself, and with everything in it that the plan says."""

import html.parser
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from planning import DISK, HOST, accelerator, blocks, cost, plan_for, problem, room_on

from bigmodel.device_map.picture import draw
from bigmodel.device_map.planner import decide, timeline
from bigmodel.units import GIB, format_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    units = [cost("embed", 30_000_000, can_gather=True), *blocks(24, 100_000_000), cost("head <&>", 120_000_000)]
    plan = plan_for(units, 1_300_000_000)
    return plan, draw(plan, timeline(plan, problem(units), HOST), "a model & <its> plan")


class Reader(html.parser.HTMLParser):
    """Collects elements, and sees that every one that is opened is closed."""

    VOID = ("meta", "line", "rect")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.counts, self.text, self.attributes = [], {}, [], []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_one_page_that_needs_nothing_else(page):
    _, text = page
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not [value for name, value in reader.attributes if name in ("src", "href")]
    assert "http" not in text
    assert "script" not in reader.counts
    words = " ".join(reader.text)
    assert "a model & <its> plan" in words
    assert "head <&>" in words


def test_it_draws_every_unit_and_every_event(page):
    plan, text = page
    told = re.findall(r"<title>([^<]*)</title>", text)
    for place in plan.placements:
        name = place.unit.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert sum(each.startswith(f"{name}: ") for each in told) == 1
        assert sum(each.startswith(f"{name}, first pass: ") for each in told) in (1, 2)
        assert sum(each.startswith(f"{name}, step 2: ") for each in told) in (1, 2)
    assert plan.explain().splitlines()[0].split()[0] in text
    assert "time per token" in text


def test_bars_end_at_the_peak():
    units = blocks(12, 100_000_000)
    machine = replace(HOST, accelerators=(accelerator(0),))
    limits = {"cpu": GIB, "disk": DISK, "cuda:0": room_on(400_000_000)}
    plan = decide(problem(units), machine, limits, homes={each.unit.name: "disk" for each in units})
    text = draw(plan, [], "all on disk").partition("Where every unit rests")[0]
    bars = dict.fromkeys(plan.estimate.peak_bytes, 0.0)
    del bars["disk"]
    rows = re.split(r'<rect class="track"', text)[1:]
    for tier, row in zip(bars, rows, strict=True):
        track = float(re.search(r'width="([\d.]+)"', row).group(1))
        drawn = sum(map(float, re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', row)))
        assert drawn == pytest.approx(plan.estimate.peak_bytes[tier] / plan.limits[tier] * track, abs=0.2)
        assert f"{format_bytes(plan.estimate.peak_bytes[tier])} of" in row


@pytest.mark.skipif(CHROMIUM is None, reason="draws it in a real browser; there is none")
def test_a_browser_shows_it(page, tmp_path):
    _, text = page
    (tmp_path / "plan.html").write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{tmp_path / 'plan.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("<rect") == text.count("<rect")
