"""The page around the pictures: Jinja2, every value escaped but the two that Bokeh makes."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="trainer.report">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ name }}: report</title>
<link rel="icon" href="data:,">
<style>{{ style|safe }}</style>
{{ scripts|safe }}
</head>
<body>
<header>
  <h1>{{ name }}</h1>
  <p class="state">{{ folder }} · {{ state }}</p>
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
<section id="{{ section.id }}"><h2>{{ section.title }}</h2>
  {% for text in section.texts %}<p>{{ text }}</p>{% endfor %}
  {% if section.cards %}<div class="cards">
  {% for id, card in section.cards %}
    <figure{% if card.wide %} class="wide"{% endif %}>
      <figcaption>{{ card.title }}</figcaption>
      <p class="keys">{% for key in card.keys %}
        <span><i style="background:{{ key.color }}"></i>{{ key.text }}</span>{% endfor %}
      </p>
      {{ divs[id]|safe }}
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
}
@media print { body { background: #fff; } figure { break-inside: avoid; } }
"""
