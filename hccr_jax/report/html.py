"""HTML pages, made from the templates in `templates/`; each page is one self-contained file."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")


class Card(NamedTuple):
    """A figure at the head of a page."""

    label: str
    text: str
    is_main: bool = False


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
      template: a file in `templates/`.
      **values: all that the template names; text is escaped, images are the bytes of PNG files.
    """
    return _PAGES.get_template(template).render(values)
