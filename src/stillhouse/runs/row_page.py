"""Rows as one HTML file that needs nothing else: tokens, what is trained on, and the images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from stillhouse.files import atomic
from stillhouse.runs.row_views import RowView

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rows as the models read them</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 1rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h2 small { font-weight: normal; color: #667; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .5rem; background: #f4f5f7; }
figure { display: inline-block; margin: .3rem .6rem .3rem 0; } figcaption { font-size: .8rem; color: #667; }
img { display: block; max-width: 160px; } .trained { background: #c9ecd0; } .control { background: #d6dbe6; }
.trained.control { background: #8ed3a0; }
.dropped { color: #a12020; }
</style>
<h1>Rows as the models read them</h1>
<p><span class="trained">trained on</span> <span class="control">control token</span>
other text is only read</p>
{% for view, shown in rows %}
<h2>{{ view.id }} <small>{{ view.format }}</small></h2>
{% if view.dropped %}<p class="dropped">left out: {{ view.dropped }}</p>{% endif %}
{% for image, thumbnail in shown %}
<figure><img src="{{ thumbnail }}" alt="image {{ loop.index }}">
<figcaption>{{ image.width }} x {{ image.height }}
</figcaption></figure>{% endfor %}
{% for name, pieces in (("prompt", view.prompt_pieces), ("response", view.response_pieces),
("rejected", view.rejected_pieces)) if pieces %}
<div>{{ name }}</div>
<pre>{% for piece in pieces %}<span class="{{ 'trained ' if piece.trained }}{{ 'control' if
piece.control }}">{{ counted(piece.text) }}</span>{% endfor %}</pre>{% endfor %}
{% endfor %}
</html>
"""


def write_row_page(path: Path, views: Sequence[RowView]) -> None:
    """Write the page; the texts of rows are escaped, images are small copies inside of it.

    Raises:
        DataError: an image is not there any more.
    """
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    rows = [(view, [(image, image.thumbnail()) for image in view.images]) for view in views]
    with atomic(path) as handle:
        handle.write(page.render(rows=rows, counted=counted))


def counted(text: str) -> str:
    """A text with runs of one control token as how many there are: `<image> x 576`."""
    tokens = text.replace("><", ">\0<").split("\0")
    runs = ((token, len(list(same))) for token, same in groupby(tokens))
    return "".join(f"{token} x {count} " if count > 3 else token * count for token, count in runs)
