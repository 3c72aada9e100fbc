"""The page of a run: escaping, sizes, and what a person can do with it in a real browser."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.report import Chart, Comparison, Group, LayerMap, Picture, Report, Table, _means, render, write
from tests.browser import CHROMIUM, DRIVER, Browser
from tests.conftest import make_photo

HOSTILE = (
    '</script><script>document.title="run"</script>"\'><img src="http://example.com/x" onerror="alert(1)">\u202egnp.exe'
)


def heat(height: int, width: int) -> np.ndarray:
    """A map in 0…1 that rises from left to right."""
    return np.linspace(0, 1, width)[None].repeat(height, 0)


def example(name: str = "photo") -> Report:
    """A page with everything that a page can hold; `name` stands wherever a file name can get."""
    photo = Picture(name, name, make_photo(1, 300, 400), f"Photo {name}")
    saliency = Picture(f"{name}-saliency", "Saliency map", heat(300, 400), "Brighter to the right", scale=("0", "1"))
    small = Picture(f"{name}-conv5", f"conv5 {name}", heat(6, 8), "Brighter to the right", pixelated=True)
    return Report(
        title=f"Photo {name}",
        lead=[f"Maps of {name}."],
        unfinished=f"{name} is not finished.",
        comparisons=[Comparison(photo, saliency, aligned=True), Comparison(photo, small)],
        maps=[
            LayerMap("vgg16 conv5_3", 7 * heat(300, 400), heat(300, 400)),
            LayerMap(f"alexnet {name}", 2 - 2 * heat(6, 8), 1 - heat(6, 8)),
        ],
        groups=[Group(f"Maps of {name}", [photo, saliency, small], note=name)],
        charts=[
            Chart("loss", {"vlm": (range(900), 2 - np.arange(900) / 1000), name: (range(9), [1e-3] * 9)}, log=True),
            Chart(f"{name} loss", {name: ([0, 50, 100], [0.5, float("nan"), 0.25])}, x_label=name, note=name),
        ],
        tables=[
            Table(
                "Scores",
                ["map", "AUC"],
                [["b", "0.857 [0.843, 0.870]"], [name, "–"], ["c", "−0.1"], ["a", "0.934"]],
                note=name,
            )
        ],
        facts={"Files": {name: name, "nothing": None, "a list": [1, 2]}},
    )


class _Found(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Elements and their attributes as a browser's parser would find them."""
    parser = _Found()
    parser.feed(page)
    return parser.tags


def test_names_of_files_are_shown_and_nothing_else() -> None:
    plain, hostile = tags(render(example())), tags(render(example(HOSTILE)))
    assert [tag for tag, _ in plain] == [tag for tag, _ in hostile], "a name opened an element"
    assert [set(attributes) for _, attributes in plain] == [set(attributes) for _, attributes in hostile]
    assert "\u202e" not in render(example(HOSTILE)), "a name turned the reading direction"


def test_the_page_holds_all_it_needs() -> None:
    page = render(example())
    for tag, attributes in tags(page):
        for key in ("src", "href"):
            value = attributes.get(key) or "#"
            assert value.startswith(("data:", "#")), value
        if tag == "img" and "id" in attributes:
            assert attributes["alt"] and attributes["width"] and attributes["height"]
    assert "url(" not in page and "@import" not in page and "http" not in re.sub(r'http-equiv="', "", page)


def test_every_picture_stands_once_and_can_be_downloaded() -> None:
    page = render(example())
    pictures = [a["id"] for tag, a in tags(page) if tag == "img" and "id" in a]
    links = {a["data-picture"]: a["download"] for tag, a in tags(page) if tag == "a" and a["class"] == "download"}
    assert sorted(links) == sorted(pictures) and len(set(links.values())) == 3
    assert page.count('src="data:image/') == 3, "twice inside would make the page twice as large"


def test_pictures_that_no_group_names_get_one() -> None:
    report = example()
    report.groups = []
    assert len([a for tag, a in tags(render(report)) if tag == "img" and "id" in a]) == 3


def test_a_large_photo_stays_small_on_the_page() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2000, 3000, 3), np.uint8)
    large = Picture("large", "large", noise, "noise")
    assert len(large.encoded[0]) < 2_000_000


def test_cells_are_the_means_of_what_they_cover() -> None:
    values = np.arange(5 * 7, dtype=float).reshape(5, 7)
    expected = [values[a:b, c:d].mean() for a, b in ((0, 2), (2, 5)) for c, d in ((0, 2), (2, 4), (4, 7))]
    assert _means(values, 2, 3) == pytest.approx(expected)
    assert _means(values, 5, 7) == values.ravel().tolist()


def test_an_empty_report_is_a_page() -> None:
    page = render(Report("nothing"))
    assert "<h1>nothing</h1>" in page and "None" not in page


def test_a_constant_line_and_a_single_point_can_be_drawn() -> None:
    charts = [Chart("a", {"": ([1], [1.0])}), Chart("b", {"": ([1, 2], [0.0, 0.0])}), Chart("c", {"": ([], [])})]
    page = render(Report("", charts=[*charts, Chart("d", {"": ([1, 2], [1e-3, 1e-3])}, log=True)]))
    assert page.count("<polyline") == 4 and "nan" not in page


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver")
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    write(tmp_path / "report.html", example(HOSTILE))
    browser.look(width=1200, height=900)
    browser.console(), browser.requested()
    browser.open(tmp_path / "report.html")
    return browser


def test_nothing_is_requested_and_nothing_complains(page: Browser, tmp_path: Path) -> None:
    page.click("fieldset label:nth-of-type(2)")
    assert page.console() == []
    assert page.requested() == [(tmp_path / "report.html").as_uri()]
    assert page.run("return document.title").startswith("Photo </script>"), "no script but the page's own ran"


def test_the_slider_moves_the_cut(page: Browser) -> None:
    cut = "return getComputedStyle(document.querySelector('.after')).clipPath"
    assert page.run(cut) == "inset(0px 0px 0px 50%)"
    page.press(".slider input", *["\ue014"] * 7)  # arrow right
    assert page.run(cut) == "inset(0px 0px 0px 57%)"
    assert page.run("return document.querySelector('.slider input').value") == "57"


def test_another_picture_can_be_chosen_by_keyboard(page: Browser) -> None:
    shown = "return document.querySelector('.after').src"
    before = page.run(shown)
    page.press("fieldset input", "\ue014")
    assert page.run(shown) not in ("", before)
    assert page.run("return document.querySelector('.right').textContent").startswith("conv5 ")


def test_layers_are_read_out_where_the_pointer_is(page: Browser) -> None:
    def read() -> list[int]:
        texts = page.run("return [...document.querySelectorAll('.readout output')].map(o => o.textContent)")
        return [int(text.removesuffix(" %")) for text in texts]

    box = page.run("const b = document.querySelector('.stage').getBoundingClientRect(); return [b.x, b.y, b.width]")
    move = {"type": "pointerMove", "x": round(box[0] + 0.9 * box[2]), "y": round(box[1] + 40), "duration": 0}
    pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
    page.command("POST", "/actions", {"actions": [pointer]})
    rising, falling = read()
    assert rising == pytest.approx(90, abs=3) and falling == pytest.approx(10, abs=10)
    errors = page.run("return [...document.querySelectorAll('.readout dd span')].map(s => Number(s.textContent))")
    assert errors == [pytest.approx(7 * rising / 100, abs=0.1), pytest.approx(2 * falling / 100, abs=0.1)]
    page.press(".stage", *["\ue012"] * 10)  # arrow left
    assert read()[0] == pytest.approx(70, abs=4)


def test_tables_are_sorted(page: Browser) -> None:
    order = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent[0])"
    state = "return document.querySelectorAll('thead th')[1].getAttribute('aria-sort')"
    page.click("thead th:nth-child(2) button")
    assert (page.run(order), page.run(state)) == (["a", "b", "c", "<"], "descending")
    page.press("thead th:nth-child(2) button", "\ue007")  # enter
    assert (page.run(order), page.run(state)) == (["c", "b", "a", "<"], "ascending"), "what has no score stays last"
    page.click("thead th:nth-child(1) button")
    assert page.run(order)[1:] == ["a", "b", "c"]


def test_downloads_hold_the_pictures(page: Browser) -> None:
    same = "return [...document.querySelectorAll('.download')].every(a => a.href === document.getElementById("
    assert page.run(same + "a.dataset.picture).src)")


def test_curves_can_be_downloaded_as_they_are_seen(page: Browser) -> None:
    page.run("document.addEventListener('click', (event) => event.preventDefault())")  # keep the file out of the way
    page.click(".drawing")
    link = page.run("const a = document.querySelector('.drawing'); return [a.href, a.download]")
    drawing = ElementTree.fromstring(unquote(link[0].removeprefix("data:image/svg+xml,")))
    line = drawing.find(".//{http://www.w3.org/2000/svg}polyline")
    assert link[1] == "loss.svg" and line.get("stroke").startswith("rgb(") and line.get("fill") == "none"


def test_a_line_has_one_colour_in_all_charts() -> None:
    both, one = Chart("a", {"with": ([1, 2], [1, 2]), "without": ([1, 2], [2, 1])}), Chart("b", {"without": ([1], [1])})
    page = render(Report("", charts=[both, one]))
    assert re.findall(r'class="line (line\d)"', page) == ["line0", "line1", "line1"]


@pytest.mark.parametrize("dark", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_can_be_read(page: Browser, width: int, dark: bool, tmp_path: Path) -> None:
    """No sideways scrolling, text stands out from its ground (WCAG's 4.5 : 1), and there is something to see."""
    page.look(width=width, height=800, dark=dark)
    assert page.run("return document.documentElement.scrollWidth") <= width
    colours = page.run(
        "const one = (s, p) => getComputedStyle(document.querySelector(s)).getPropertyValue(p).match(/[\\d.]+/g);"
        "return [['body', 'color'], ['figcaption', 'color'], ['a', 'color'], ['.slider', 'color']]"
        ".map(([s, p]) => one(s, p)).concat([one('body', 'background-color')])"
    )
    *inks, ground = (_luminance([float(value) for value in colour[:3]]) for colour in colours)
    for ink in inks:
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 4.5
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def _luminance(rgb: list[float]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
