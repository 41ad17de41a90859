"""A report is read back as a browser would."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from etils import epath
from matplotlib.image import imread

from moe_erc.diagnosis.figures import curves, png
from moe_erc.diagnosis.html import Picture, Section, Table, page
from moe_erc.diagnosis.report import write_text

NASTY = "<script>a & \"b\"</script> 'c'"


class Reader(HTMLParser):
    """(tag, attributes) in order, tags that were left open, and the text."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_texts_are_shown_as_written():
    sections = [
        Section(NASTY, (NASTY, "second"), (Table((NASTY, "n"), [(NASTY, 5)], NASTY),), (Picture(b"", NASTY, NASTY),))
    ]
    document = page(NASTY, sections)
    reader = Reader(document)
    assert not reader.open and "script" not in [tag for tag, _ in reader.tags]
    # title and h1; h2, paragraph; head, cell and caption of the table; caption of the picture
    assert reader.text.count(NASTY) == 8 and {"second", "5"} <= set(reader.text)
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == [NASTY]
    assert [tag for tag, _ in reader.tags].count("p") == 2


def test_figures_travel_inside_and_nothing_is_fetched():
    image = png(curves({"loss": {"a": ([1, 2], [2, 1])}}, "step"))
    document = page("runs", [Section("curves", pictures=(Picture(image, "loss"),))])
    (source,) = [attributes["src"] for tag, attributes in Reader(document).tags if tag == "img"]
    kind, data = source.split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == image
    assert np.ptp(imread(io.BytesIO(base64.b64decode(data)), format="png")) > 0
    rest = document.replace(data, "")
    assert not [word for word in ("http", "//", "url(", "@import", "<script", "<link") if word in rest]


def test_a_page_replaces_the_one_before(tmp_path):
    path = epath.Path(tmp_path) / "report.html"
    for title in ("old", "new"):
        write_text(path, page(title, []))
    assert "new" in path.read_text() and [file.name for file in tmp_path.iterdir()] == ["report.html"]
