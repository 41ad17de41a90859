"""A report as one HTML file: its figures are inside, there is no script, and nothing is fetched.

The page prints well and follows a dark desktop. The template library escapes every text, so that names and captions
are shown as they are written.
"""

import base64
from typing import NamedTuple

from moe_erc.checks import BadInput

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; font-size: 0.875rem; opacity: 0.8; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { max-width: 100%; background: white; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<table>
<caption>{{ table.caption }}</caption>
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for picture in section.pictures %}
<figure>
<img src="data:image/png;base64,{{ picture.base64 }}" alt="{{ picture.alt }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


class Table(NamedTuple):
    """Cells are shown by `str`."""

    columns: tuple
    rows: list
    caption: str = ""


class Picture(NamedTuple):
    """`alt` is what is read to someone who does not see the picture."""

    png: bytes
    alt: str
    caption: str = ""

    @property
    def base64(self) -> str:
        """The picture as text inside the page."""
        return base64.b64encode(self.png).decode()


class Section(NamedTuple):
    """A heading with its paragraphs, tables and pictures, in this order."""

    heading: str
    paragraphs: tuple = ()
    tables: tuple = ()
    pictures: tuple = ()


def page(title: str, sections: list[Section]) -> str:
    """The whole document.

    Raises:
      BadInput: where the extra `plot`, which brings jinja2, is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise BadInput('a report needs jinja2: pip install -e ".[plot]"') from None
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(title=title, sections=sections)
