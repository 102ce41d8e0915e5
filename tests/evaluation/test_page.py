"""The page in a browser: its address filters, sorts, searches and opens; texts stay texts."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llama_lightning.evaluation.charts import histogram, scatter
from llama_lightning.evaluation.duels import Duel
from llama_lightning.evaluation.page import Pair, compare_page, report_page
from llama_lightning.evaluation.report import Graded, summarise
from llama_lightning.evaluation.settings import Settings
from llama_lightning.records import Response, Verdict

SETTINGS = Settings("judge <b>", True, 0.0, 0, 1024, "words")
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)> ${title}'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update --enable-logging=stderr"


def graded(number: int, score: int | None, text: str, sample: int = 0) -> Graded:
    status = "unparsed" if score is None else "graded"
    return Graded(
        Response(number, f"Say {number}.", "", "reference", text, 0, "stop", sample),
        Verdict("", "judge", number, sample, status, score, "", f"Feedback {number}"),
    )


ROWS = [
    graded(0, 2, "a pear"),
    graded(1, 5, "an apple, of many"),
    graded(2, None, "Apple!"),
    graded(3, 5, "apple pie"),
    graded(10, 1, HOSTILE),
]


def report(rows: list[Graded]) -> str:
    return report_page(summarise(rows, SETTINGS), rows)


class Page:
    """What a browser makes of a page."""

    def __init__(self, dom: str, log: str) -> None:
        body = dom[dom.index("<tbody") : dom.index("</tbody")]
        self.rows = re.findall(r'<tr class="row"[^>]* data-name="([^"]*)"', body)
        self.panels = dict(re.findall(r"<h2>(.*?)</h2><p[^>]*>(.*?)</p>", body, re.DOTALL))
        self.title = re.search("<title>(.*?)</title>", dom)[1]
        self.count = re.search('<output id="count">(.*?)<', dom)[1]
        self.dom = dom
        self.console = [line for line in log.splitlines() if "CONSOLE" in line]


Browse = Callable[..., Page]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Open a page as a file and wait until its script has run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")

    def call(page: str, address: str = "", script: str = "") -> Page:
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, "--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}#{address}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return Page(done.stdout, done.stderr)

    return call


@pytest.mark.browser
@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("", ["0", "1", "2", "3", "10"]),
        ("q=apple&score=5&sort=length&open=3", ["3", "1"]),
        ("q=APPLE&sort=-id", ["3", "2", "1"]),
        ("status=unparsed", ["2"]),
        ("score=none", ["2"]),
        ("sort=score", ["10", "0", "1", "3", "2"]),
        ("sort=-score", ["1", "3", "0", "10", "2"]),
        ("q=%3Cimg&nonsense=%E0%A4%A&page=9", ["10"]),
        ("q=nowhere", []),
    ],
)
def test_the_address_is_the_view(browse: Browse, address: str, names: list[str]) -> None:
    page = browse(report(ROWS), address)
    assert page.console == []
    assert page.rows == names
    assert page.count == f"{len(names)} of 5"
    if "open=3" in address:
        assert page.panels["Response"] == "apple pie"
        assert page.panels["Feedback"] == "Feedback 3"
        assert "Input" not in page.panels  # there is none


@pytest.mark.browser
def test_texts_stay_texts(browse: Browse) -> None:
    page = browse(report(ROWS), "open=10")
    assert page.console == []
    assert page.title == "Judge report"
    assert page.panels["Response"].startswith("&lt;/script&gt;&lt;script&gt;")
    assert "<img" not in page.dom
    assert "judge &lt;b&gt;" in page.dom


@pytest.mark.browser
def test_clicks_and_keys(browse: Browse) -> None:
    script = """
    const click = (what) => document.querySelector(what).click();
    click("#by-length button"); click("#by-length button");
    document.querySelector("#only-score").value = "5";
    document.querySelector("#only-score").dispatchEvent(new Event("change"));
    click("tr.row[data-name='1']");
    document.querySelector("tr.row[data-name='3']").dispatchEvent(
      new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
    document.querySelector("#q").value = "apple";
    document.querySelector("#q").dispatchEvent(new Event("input"));
    setTimeout(() => { document.title = location.hash; }, 1000);
    """
    page = browse(report(ROWS), "", script)
    assert page.console == []
    assert page.rows == ["1", "3"]
    assert page.panels["Response"] == "apple pie"
    assert page.title == "#sort=-length&amp;score=5&amp;open=3&amp;q=apple"


@pytest.mark.browser
def test_an_error_would_be_seen(browse: Browse) -> None:
    assert "planted" in browse(report(ROWS), "", 'console.error("planted")').console[0]


@pytest.mark.browser
def test_two_runs_side_by_side(browse: Browse) -> None:
    pairs = [
        Pair(graded(i, a, f"one {i}", sample), graded(i, b, f"other {i}", sample))
        for i, a, b, sample in [(0, 1, 3, 0), (0, 4, 4, 1), (1, 5, 2, 0), (1, None, 2, 1)]
    ]
    page = browse(compare_page([("A", "x")], pairs), "sort=-difference&open=0.0")
    assert page.console == []
    assert page.rows == ["0.0", "0.1", "1.0", "1.1"]
    assert (page.panels["Response of A"], page.panels["Response of B"]) == ("one 0", "other 0")
    assert browse(compare_page([], pairs), "outcome=loss").rows == ["1.0"]


def compared() -> str:
    long = "a" * 300  # a word that no line holds
    facts = [("A", "lightning_logs/" + long), ("B", "x")]
    said = Verdict("k", "judge", 0, 0, "graded", 1, "", long, "A")
    pairs = [
        Pair(graded(i, 1 + i % 5, long), graded(i, 5 - i % 5, "b"), Duel(said, said))
        for i in range(20)
    ]
    return compare_page(facts, pairs)


# Chromium's windows are 500 pixels wide at least; a frame in one may be narrower.
MEASURE = """
if (top === window) {
  const said = [];
  for (const width of [400, 1280]) {
    const frame = document.createElement("iframe");
    frame.src = location.href;
    frame.style = `position: absolute; border: 0; height: 900px; width: ${width}px`;
    document.body.append(frame);
  }
  onmessage = event => { said.push(event.data); document.title = said.join(";"); };
} else {
  const wide = [...document.querySelectorAll("body, body > *, dd, section, svg, table")]
    .filter(one => one.getBoundingClientRect().right > innerWidth);
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, wide.length,
    document.querySelectorAll("section").length].join(" "), "*");
}
"""


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_nothing_is_wider_than_the_screen(browse: Browse, kind: str) -> None:
    rows = [*ROWS, graded(11, 3, "a" * 3000), graded(12, None, HOSTILE)]
    page = compared() if kind == "compare" else report(rows)
    # The page allows no frames, and is framed here.
    page = page.replace("default-src 'none';", "default-src 'none'; frame-src file:;")
    shown = browse(page, "open=11", MEASURE)
    widths = []
    for said in shown.title.split(";"):
        width, scrolled, wide, sections = map(int, said.split())
        print(f"{kind} at {width}: scrolls over {scrolled} pixels, {wide} elements stick out")
        assert scrolled <= width
        assert wide == 0
        assert sections > 2  # a row is open
        widths.append(width)
    assert sorted(widths) == [400, 1280]
    assert shown.console == []


@pytest.mark.browser
def test_ten_thousand_responses(browse: Browse) -> None:
    rows = [graded(i, 1 + i % 5, f"word{i} " * 100) for i in range(10_000)]
    start = time.monotonic()
    page = report(rows)
    built = time.monotonic() - start
    script = """
    const times = ["q=word7777", "q=word77", "score=3", "sort=-length"].map(address => {
      const start = performance.now();
      history.replaceState(null, "", "#" + address);
      draw();
      return (performance.now() - start).toFixed(0);
    });
    history.replaceState(null, "", "#q=word7777&sort=-length");
    draw();
    document.title = times.join(" ");
    """
    shown = browse(page, "", script)
    loaded = time.monotonic() - start - built
    print(
        f"10,000 responses: {len(page) / 1e6:.0f} MB in {built:.1f} s, a browser starts and loads "
        f"it in {loaded:.1f} s; first search, another, filter, sort: {shown.title} ms"
    )
    assert built < 10
    assert max(map(int, shown.title.split())) < 1000
    assert shown.rows == ["7777"]
    assert len(browse(page, "page=100").rows) == 100


class Outside(HTMLParser):
    """Collect what a page would fetch, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        addresses = [value for name, value in attrs if name in ("src", "href")]
        self.fetched += [str(value) for value in addresses if not str(value).startswith("#")]


def test_one_file_with_two_scripts() -> None:
    page = report([*ROWS, graded(11, 3, "a \ud800 b  c")])
    outside = Outside()
    outside.feed(page)
    assert outside.fetched == []
    assert outside.scripts == 2  # the data, and the code
    assert "https:" not in page
    assert "http:" not in page
    assert page.encode()  # half a surrogate pair travels as its escape


def test_charts() -> None:
    bars = histogram({1: 0, 2: 10, 3: 5}, "title", link="score")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"', bars)]
    assert heights == [0, pytest.approx(2 * heights[2], abs=0.2), heights[2]]
    assert 'href="#score=2"' in bars
    dots = re.findall(r"M([\d.]+) ([\d.]+)h0", scatter([(1, 1), (10, 5), (100, 5)], "title"))
    (x1, y1), (x2, y2), (x3, _) = ((float(x), float(y)) for x, y in dots)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # a logarithmic axis
    assert y1 > y2
    assert "h0" not in scatter([], "nothing graded")
    assert "M" in scatter([(7, 3)], "one")
