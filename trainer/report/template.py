"""Pages: sections of pictures, tables and text, each page one file that needs nothing else. Bokeh comes along with it, its core
alone (1.3 MB). Jinja2 escapes every value but the two that Bokeh makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment

from data_loaders.state_files import write_text
from trainer.report.pictures import Card


@dataclass(frozen=True)
class Table:
    """``title``: it is folded away under this."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """``code``: a text shown as it is, folded away under ``code_title``."""

    id: str
    title: str
    cards: Sequence[Card] = ()
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: str = ""
    code_title: str = ""

    @property
    def empty(self) -> bool:
        return not (self.cards or self.texts or self.tables or self.code)


def render(title: str, subtitle: str, sections: Sequence[Section], **head: Any) -> str:
    """The page's text. ``head``: ``tiles``, pairs of what and how much; ``alerts``."""
    shown = [section for section in sections if not section.empty]
    cards = [card for section in shown for card in section.cards]
    script, divs = components([card.plot for card in cards]) if cards else ("", ())
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if cards else ""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return page.render(
        title=title,
        subtitle=subtitle,
        sections=shown,
        divs=dict(zip(map(id, cards), divs)),
        id=id,
        style=STYLE,
        scripts=f"{bokeh}\n{script}",
        **head,
    )


def write_picture(path: Path, title: str, card: Card) -> None:
    """A page of one picture."""
    write_text(path, render(title, "", [Section("picture", "", [card])]))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="trainer.report">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style|safe }}</style>
{{ scripts|safe }}
</head>
<body>
<header>
  <h1>{{ title }}</h1>
  <p class="state">{{ subtitle }}</p>
  <dl class="tiles">{% for what, value in tiles %}<div><dt>{{ what }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</header>
<main>
{% if alerts %}
<section id="alerts"><h2>Warnings</h2>
  <ul class="alerts">{% for alert in alerts %}
    <li><b>{{ alert.name }}</b> at step {{ alert.step }}: {{ alert.message }}</li>{% endfor %}
  </ul>
</section>
{% endif %}
{% for section in sections %}
<section id="{{ section.id }}">{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}

  {% for text in section.texts %}<p>{{ text }}</p>{% endfor %}
  {% if section.cards %}<div class="cards">
  {% for card in section.cards %}
    <figure{% if card.wide %} class="wide"{% endif %}>
      <figcaption>{{ card.title }}</figcaption>
      <p class="keys">{% for key in card.keys %}
        <span><i style="background:{{ key.color }}"></i>{{ key.text }}</span>{% endfor %}
      </p>
      {{ divs[id(card)]|safe }}
      {% if card.note %}<p class="note">{{ card.note }}</p>{% endif %}
    </figure>
  {% endfor %}</div>{% endif %}
  {% for table in section.tables %}
  {% if table.title %}<details><summary>{{ table.title }}</summary>{% endif %}
  <div class="scroll"><table>
    {% if table.head %}<thead><tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}
    <tbody>{% for line in table.lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
    {% endfor %}</tbody>
  </table></div>
  {% if table.title %}</details>{% endif %}
  {% endfor %}
  {% if section.code %}<details><summary>{{ section.code_title }}</summary><pre>{{ section.code }}</pre></details>{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; --text: #1d2127; --soft: #5b626c; --line: #e3e6ea; --paper: #fff; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
header, main { max-width: 1320px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 24px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 19px; }
section { margin: 26px 0; }
p { margin: 0 0 8px; }
.state { color: var(--soft); overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0 0; }
.tiles div { flex: 1 1 120px; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 12px; }
.tiles dt { color: var(--soft); font-size: 12.5px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.alerts { margin: 0; padding: 10px 14px 10px 30px; background: #fff6e5; border: 1px solid #f0d9a8;
  border-radius: 8px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
#slices .cards { display: block; columns: 3 380px; column-gap: 14px; }
#slices figure { break-inside: avoid; margin-bottom: 14px; }
figure { margin: 0; min-width: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px 6px; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 2px 0 4px; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.keys i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.note { color: var(--soft); font-size: 12.5px; margin: 2px 0 4px; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  margin-bottom: 8px; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
#environment td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
#environment td:first-child { white-space: nowrap; color: var(--soft); }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  font-size: 12.5px; }
@media (max-width: 560px) {
  header, main { padding-left: 10px; padding-right: 10px; }
  figure { padding: 8px 6px 4px; }
  th, td { padding: 4px 8px; }
  #results th, #results td:first-child { white-space: normal; }
}
@media print { body { background: #fff; } figure { break-inside: avoid; } }
"""
