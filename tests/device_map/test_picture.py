"""The page that draws a plan: whole by itself, and with everything in it that the plan says."""

import html.parser
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from planning import DISK, HOST, accelerator, blocks, cost, plan_for, problem, room_on

from bigmodel.device_map.explanation import format_seconds
from bigmodel.device_map.picture import draw, draw_measured
from bigmodel.device_map.planner import decide, timeline
from bigmodel.units import GIB, format_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    units = [cost("embed", 30_000_000, can_gather=True), *blocks(24, 100_000_000), cost("head <&>", 120_000_000)]
    plan = plan_for(units, 1_300_000_000)
    return plan, draw(plan, timeline(plan, problem(units), HOST), "a model & <its> plan")


def slower(steps, factor):
    """The same steps, as a slower machine would have taken them."""

    def times(span):
        return None if span is None else (span[0] * factor, span[1] * factor)

    return [replace(step, read=times(step.read), copy=times(step.copy), run=times(step.run)) for step in steps]


@pytest.fixture(scope="module")
def measured_page():
    """126 layers over two accelerators, most of them on disk, half as fast as predicted; the last pass ends early."""
    units = [cost("embed", 30_000_000, can_gather=True), *blocks(126, 100_000_000), cost("head <&>", 120_000_000)]
    machine = replace(HOST, accelerators=(accelerator(0), accelerator(1)))
    limits = {"cpu": 6 * GIB, "disk": 100 * DISK} | {f"cuda:{n}": room_on(2_000_000_000) for n in (0, 1)}
    plan = decide(problem(units), machine, limits)
    predicted = timeline(plan, problem(units), machine)
    measured = [step for step in slower(predicted, 2) if step.number < 2 or step.unit < 100]
    figures = [("time to first token", "1.24 s", "620 ms", "600 ms & no less")]
    return plan, predicted, measured, draw_measured(plan, predicted, measured, figures, "a model & <its> run")


def whole_page(request, name):
    *_, text = request.getfixturevalue(name)
    return text


EACH_PAGE = pytest.mark.parametrize("name", ["page", "measured_page"])


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


@EACH_PAGE
def test_it_is_one_page_that_needs_nothing_else(name, request):
    text = whole_page(request, name)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not [value for name, value in reader.attributes if name in ("src", "href")]
    assert "http" not in text
    assert "script" not in reader.counts
    words = " ".join(reader.text)
    assert "a model & <its>" in words
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


BOX = re.compile(
    r'<rect x="(?P<x>[\d.]+)" y="[\d.]+" width="(?P<width>[\d.]+)" height="\d+" fill="[^"]+"><title>(?P<told>[^<]*)</title>'
)


def timelines(text):
    """The drawings of what was measured and of what was predicted."""
    _, measured, predicted, _ = text.split("<h2>")
    assert measured.partition("</h2>")[0].endswith("as measured")
    assert predicted.partition("</h2>")[0].endswith("as predicted, on the same scale of time")
    return measured, predicted


def test_what_was_measured_stands_above_what_was_predicted_on_one_scale(measured_page):
    _, predicted, measured, text = measured_page
    drawn = timelines(text)
    rows = [re.findall(r'<text x="0.0"[^>]*>([^<]*)</text>', each) for each in drawn]
    assert rows[0] == rows[1]
    assert rows[0][0] == "disk"
    assert {"link to cuda:0", "link to cuda:1", "runs on cuda:0", "runs on cuda:1"} <= set(rows[0])
    end_s = max(step.run[1] for step in measured if step.number < 3)
    for steps, each in zip((measured, predicted), drawn, strict=True):
        spans = [span for s in steps if s.number < 3 for span in (s.read, s.copy, s.run) if span is not None]
        found = [match.groupdict() for match in BOX.finditer(each)]
        assert len(found) == len(spans)
        (track,) = set(re.findall(r'<rect class="track" x="170" y="\d+" width="([\d.]+)"', each))
        scale = float(track) / end_s
        for match, (begin, end) in zip(found, spans, strict=True):
            assert float(match["x"]) == pytest.approx(170 + begin * scale, abs=0.01)
            assert float(match["width"]) == pytest.approx(max((end - begin) * scale - 0.3, 0.6), abs=0.01)
    assert [match[1] for match in re.findall(r"(<td>)([^<]*)</td>", text)] == [
        "1.24 s",
        "620 ms",
        "600 ms &amp; no less",
    ]


def test_who_points_at_a_box_is_told_both_times(measured_page):
    plan, predicted, _, text = measured_page
    step = next(step for step in predicted if step.number == 1 and step.unit == 90)
    begin, end = step.run
    own = f"{format_seconds(begin)} to {format_seconds(end)} ({format_seconds(end - begin)})"
    twice = f"{format_seconds(2 * begin)} to {format_seconds(2 * end)} ({format_seconds(2 * (end - begin))})"
    name = plan.placements[90].unit
    above, below = timelines(text)
    assert f"<title>{name}, step 1: measured {twice}; predicted {own}</title>" in above
    assert f"<title>{name}, step 1: predicted {own}; measured {twice}</title>" in below
    missing = plan.placements[120].unit
    assert re.search(rf"<title>{missing}, step 2: predicted [^<]*; measured not at all</title>", below)
    assert f"<title>{missing}, step 2:" not in above


def test_a_resource_that_did_nothing_keeps_its_row_and_tokens_do_not_stand_on_each_other(measured_page):
    plan, predicted, _, _ = measured_page
    # A first pass that takes nearly all of the time, and nothing read.
    first = [step for step in predicted if step.number == 0]
    end = max(step.run[1] for step in first)
    late = [
        replace(step, number=number, run=(end, end * (1 + number / 500))) for step in first[-1:] for number in (1, 2)
    ]
    measured = [replace(step, read=None) for step in [*first, *late]]
    above, _ = timelines(draw_measured(plan, predicted, measured, [], "no reads"))
    assert re.findall(r'<text x="0.0"[^>]*>([^<]*)</text>', above)[0] == "disk"
    labels = re.findall(r'<text x="([\d.]+)" y="14.0" text-anchor="end"[^>]*>([^<]*)</text>', above)
    assert [each.split(" ")[0:2] for _, each in labels] == [["first", "token"]]
    assert above.count("stroke-dasharray") == 3
    assert "Nothing runs." in draw_measured(plan, predicted, [], [], "nothing")


@pytest.mark.skipif(CHROMIUM is None, reason="draws it in a real browser; there is none")
@EACH_PAGE
def test_a_browser_shows_it(name, request, tmp_path):
    text = whole_page(request, name)
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
