"""The report as one HTML page."""

import difflib
import math
import re
import sys

from jinja2 import ChainableUndefined, Environment
from markupsafe import Markup, escape

from tool_calling.terminal import plural

SHOWN_CHARACTERS = 2000  # of any one text in the report; the rest is counted, not shown
INVISIBLE = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
SCORE_NAMES = {
    "exact_match": "Exact match",
    "ast_match": "AST match",
    "tool_macro_f1": "Tool macro-F1",
    "call_precision": "Call precision",
    "call_recall": "Call recall",
    "broken_json": "Broken JSON",
}
REPORT_TEMPLATE = """<!doctype html>
{% macro section(title, note="") %}<section><div><h2>{{ title }}</h2><p class="note">{{ note }}</p></div>
<div>{{ caller() }}</div></section>{% endmacro %}
{% macro listed(kind, pairs) %}<dl class="{{ kind }}">{% for name, value in pairs if value or kind == "pairs" %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>{% endmacro %}
{% macro chart(curve, label) %}<figure role="img" aria-label="{{ label }} by step">
<div class="y"><span>{{ curve.top }}</span><span>{{ curve.half }}</span><span>0</span></div>
<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path class="grid" d="M0 0H100M0 50H100M0 100H100"/>
{% for line in curve.lines %}<polyline class="{{ line.kind }}" points="{{ line.points }}"/>
{% if line.dots %}<path class="dots" d="{{ line.dots }}"/>{% endif %}{% endfor %}</svg>
<div class="x"><span>step 0</span><span>{{ curve.steps | number }}</span></div>
<figcaption>{{ label }}: {% for line in curve.lines %}{{ ", " if not loop.first }}
<span class="{{ line.kind }}">{{ line.name }} {{ line.last }}</span>{% endfor %}</figcaption></figure>{% endmacro %}
{% macro bar(score, kind) %}<div class="bar {{ kind }}"><i style="--exact:{{ score.exact | share }};
--tool:{{ score.tool | share }}"></i><span>{{ score.exact | percent }}</span></div>{% endmacro %}
{% set unit = data.unit or "rows" %}{% set tested = "training" if data and not data.held_out else "held-out" %}
{% macro named(name) %}{{ name if name == "model" else name ~ " model" }}{% endmacro %}
{% set fell = scores and scores[last].exact_match < scores[first].exact_match %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ headline }}</title><style>
:root { --paper:#fdfcfa; --ink:#1f1e1c; --mute:#67635d; --line:#e4e0d8; --soft:#f4f1eb; --base:#8b867e;
  --accent:#0b6e5f; --bad:#b3261e; color-scheme:light dark; print-color-adjust:exact; -webkit-print-color-adjust:exact }
@media screen and (prefers-color-scheme:dark) { :root { --paper:#171716; --ink:#e9e6e0; --mute:#a19c94; --line:#33312e;
  --soft:#21201e; --base:#88837b; --accent:#5fc9b1; --bad:#ff9186 } } * { box-sizing:border-box } body { margin:0 auto;
  max-width:74rem; padding:clamp(2rem,6vw,5.5rem) clamp(1.1rem,5vw,4rem); background:var(--paper); color:var(--ink);
  font:1rem/1.55 system-ui,sans-serif; font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
h1 { font-size:clamp(2.1rem,6.5vw,4rem); line-height:1.08; letter-spacing:-.025em; font-weight:600; margin:0 0 1.2rem;
  text-wrap:balance } h1 span, .lead span { display:inline-block } .scores td { white-space:nowrap } .after {
  color:var(--accent) } .fell, .bad { color:var(--bad) } .bad { margin:.6rem 0 0; font-weight:600 } .lead {
  font-size:1.15rem; max-width:44rem; color:var(--mute); margin:0 } h2 { font-size:1rem; font-weight:600; margin:0 0
  .4rem } .note, dt { color:var(--mute); font-size:.84rem; margin:0 } section > div { min-width:0 } section {
  display:grid; grid-template-columns:12rem minmax(0,1fr); gap:1rem 3rem; margin-top:clamp(2rem,4vw,3rem);
  padding-top:1.5rem; border-top:1px solid var(--line) }
table { border-collapse:collapse; width:100%; font-size:.94rem } th { font-weight:400; text-align:left } td, .scores
  thead th:not(:first-child) { text-align:right } thead th { color:var(--mute); font-size:.84rem } th, td {
  padding:.42rem 0 .42rem .6rem } tr > :first-child { padding-left:0 } tbody tr { border-top:1px solid var(--line) }
  .scores tr > :last-child { color:var(--accent); font-weight:600 } .tools thead th { white-space:nowrap } .tools tr >
  :last-child { width:58%; padding-left:1.5rem } .bar { --c:var(--base); display:flex; align-items:center; gap:.6rem;
  font-size:.8rem; line-height:1.3; color:var(--mute) } .bar i { flex:1; height:.5rem; border-radius:2px;
  background:linear-gradient(90deg, var(--c) var(--exact), color-mix(in srgb,var(--c) 32%,transparent) 0 var(--tool),
  var(--soft) 0) } .bar span { width:3.2rem } .bar.last { --c:var(--accent); color:var(--ink) } .wide { overflow-x:auto
  } .matrix { width:auto; font-size:.8rem } .matrix tr { border:0 } .matrix tbody td { text-align:center;
  min-width:1.9rem; height:1.9rem; padding:.1rem; border:1px solid var(--paper); background:color-mix(in
  srgb,var(--c,var(--soft)) var(--heat,0%),var(--soft)) } .hit { --c:var(--accent); font-weight:600 } .miss {
  --c:var(--bad) } .matrix thead th { writing-mode:vertical-rl; rotate:180deg; max-height:10rem; padding:.4rem 0;
  line-height:1.1 } .matrix tbody th { min-width:6rem; max-width:13rem; padding-right:.7rem; line-height:1.2 }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr)); gap:2rem } figure {
  margin:0; display:grid; grid-template-columns:auto 1fr; gap:.2rem .6rem; font-size:.8rem; color:var(--mute) } .y, .x {
  display:flex; justify-content:space-between } .y { flex-direction:column; text-align:right; margin:-.6rem 0 } .x,
  figcaption { grid-column:2 } figcaption { font-size:.9rem; color:var(--ink) } figcaption .held { color:var(--accent) }
  svg { width:100%; height:11rem; overflow:visible } svg * { fill:none; stroke:var(--base); stroke-width:1.5px;
  vector-effect:non-scaling-stroke } svg .grid { stroke:var(--line); stroke-width:1px } svg .held, svg .dots {
  stroke:var(--accent) } svg .dots { stroke-width:6px; stroke-linecap:round } .bins { grid-column:1/3; display:flex;
  align-items:flex-end; gap:1px; height:7rem; margin-top:1.8rem } .bins + .x { grid-column:1/3 } .bins i { flex:1;
  background:var(--accent) }
dl, dd { margin:0 } .facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr));
  gap:1.6rem 1.5rem } .facts div { display:flex; flex-direction:column-reverse; justify-content:flex-end } .facts dd {
  font-size:1.5rem; line-height:1.2; letter-spacing:-.01em } .pairs { columns:2 19rem; column-gap:3rem; font-size:.88rem
  } .pairs div { display:flex; gap:1rem; padding:.28rem 0; justify-content:space-between; border-bottom:1px solid
  var(--line); break-inside:avoid } .pairs dt { flex:none; max-width:50% } .pairs dd { text-align:right } details {
  border-bottom:1px solid var(--line) } summary { cursor:pointer; padding:.6rem 0; display:flex; gap:.2rem 1rem;
  align-items:baseline } summary::before { content:"+"; color:var(--accent); width:.7rem } [open] > summary::before {
  content:"–" } summary .note { flex:none; max-width:45% } bdi { flex:1; min-width:0; overflow:hidden;
  white-space:nowrap; text-overflow:ellipsis } [open] bdi { white-space:pre-wrap } .answers { padding:.2rem 0 1.4rem
  1.7rem; display:grid; gap:.7rem; color:var(--mute); font-size:.84rem } pre { margin:.15rem 0 0; padding:.7rem .9rem;
  background:var(--soft); color:var(--ink); border-radius:4px; white-space:pre-wrap; max-height:32rem; overflow:auto;
  unicode-bidi:isolate; font:.84rem/1.55 ui-monospace,monospace } .command { user-select:all } ins, del {
  --c:var(--accent); color:var(--c); background:color-mix(in srgb,var(--c) 10%,transparent); text-underline-offset:.2em
  } del { --c:var(--bad) } @media (max-width:50rem) { section { grid-template-columns:minmax(0,1fr) } } @media
  (max-width:34rem) { summary { flex-wrap:wrap } summary .note { max-width:85% } bdi { flex-basis:100% } .answers {
  padding-left:0 } .tools tr > :last-child { padding-left:.9rem; width:52% } }
@media print { @page { margin:16mm } body { padding:0; font-size:10pt; background:none } section {
  grid-template-columns:minmax(0,1fr) } section > :first-child { break-after:avoid } tr, figure, .facts div {
  break-inside:avoid } details::details-content { content-visibility:visible } bdi { white-space:pre-wrap }
  summary::before { content:none } .wide, pre { overflow:visible; max-height:none } .matrix { width:100% } .matrix tbody
  td { min-width:0 } .answers { padding-left:0 } }
</style></head><body><main><h1>{% if scores %}
{% if first != last %}<span>{{ scores[first].exact_match | percent }}</span> → {% endif %}
<span class="{{ "fell" if fell else "after" }}">{{ scores[last].exact_match | percent }}</span> of calls exact
{% else %}{{ headline }}{% endif %}</h1>
{% if data %}<p class="lead">{{ args.eval_only or args.model_id }}
{%- if train %}, trained on {{ data.train | number }} {{ unit }}{% endif %}
{% if scores %}, measured on {{ scores[last].n | number }} {{ tested }} {{ unit }}{% endif %} of {{ data.path }}
{%- if device %}, on {{ device }}{% endif %}{% if finished %}, <span>{{ finished }}</span>{% endif %}.</p>{% endif %}
{% if fell %}<p class="bad">The {{ last }} model does worse than the {{ first }} model.</p>{% endif %}
{% if scores %}{% call section("Scores", "On the " ~ tested ~ " " ~ unit ~ ".") %}<table class="scores">
<thead><tr><td></td>{% for name in scores %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for key, label in score_names.items() %}<tr><th scope="row">{{ label }}</th>{% for score in scores.values() %}
<td>{{ score[key] | number if key == "broken_json" else score[key] | percent(1) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% endcall %}{% endif %}
{% if curves %}{% call section("Learning") %}<div class="charts">
{% for label, curve in curves.items() %}{{ chart(curve, label) }}{% endfor %}</div>{% endcall %}{% endif %}
{% if tools %}{% call section("Tools", "Full colour: exact. Pale: the right tool, other arguments. " ~
("Grey is " ~ first ~ ", green " ~ last ~ ". " if first != last else "") ~ "Weakest first.") %}<table class="tools">
<thead><tr><th scope="col">tool</th><th scope="col">rows</th><th scope="col">exact</th></tr></thead><tbody>
{% for name, tool in tools %}<tr><th scope="row">{{ name | breakable }}</th><td>{{ tool.support | number }}</td><td>
{% if first != last %}{{ bar(tool[first], "first") }}{% endif %}{{ bar(tool[last], "last") }}</td></tr>
{% endfor %}</tbody></table>{% endcall %}{% endif %}
{% if matrix.rows %}
{% call section("Confusion", "Rows: the tool expected. Columns: the tool called by the " ~ named(last) ~ ".") %}
<div class="wide" tabindex="0" role="region" aria-label="Confusion table"><table class="matrix">
<thead><tr><td></td>{% for name in matrix.columns %}<th scope="col">{{ name | breakable }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in matrix.rows %}<tr><th scope="row">{{ name | breakable }}</th>
{% for kind, heat, n in cells %}<td class="{{ kind }}" style="--heat:{{ heat }}%">{{ n or "" }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endcall %}{% endif %}
{% if data %}{% call section("Data", data.path) %}
{{ listed("facts", [(unit, data.rows | number), ("for training", data.train | number),
("held out", data.held_out | number), ("skipped", data.skipped | number),
("tokens in each on average", data.tokens.mean | number), ("tokens at most", data.tokens.max | number)]) }}
{% set bins = data.lengths %}{% if bins.counts %}
<figure role="img" aria-label="Rows by length"><div class="bins">{% for count in bins.counts %}
<i style="height:{{ (count / (bins.counts | max or 1)) | share }}"></i>{% endfor %}</div>
<div class="x"><span>{{ bins.edges[0] | number }} tokens</span><span>{{ bins.edges[-1] | number }}</span>
</div></figure>{% endif %}{% endcall %}{% endif %}
{% if train %}{% call section("Training") %}
{% set computed, padded, memory = train.tokens_computed, train.tokens_padded, train.peak_memory_gib | number %}
{{ listed("facts", [("samples per second", train.samples_per_second | number),
("tokens per second", train.tokens_per_second | number), ("tokens computed: " ~ computed | number ~ " instead of " ~
padded | number, computed and "%.1f times fewer" % (padded / computed)), ("peak memory", memory and memory ~ " GiB"),
("for " ~ train.steps | plural("step"), "%d min %d s" % (train.seconds // 60, train.seconds % 60)),
("mean loss", train.loss | number), ("the step that is kept", train.kept_step < train.last_step and
train.kept_step | number), ("resumed from", train.resumed_from)]) }}{% endcall %}{% endif %}
{% if failures or scores and scores[last].exact_match == 1 %}
{% call section("Failures (" ~ failures | length | number ~ ")", failures and "Answers of the " ~ named(last) ~ " that
are not the expected ones. Underlined: only expected. Struck: only answered." or "Every answer is the expected one.") %}
{% for failure in failures %}{% set expected, got = mark_difference(failure.expected, failure.got) %}
<details><summary><span class="note">{{ failure.where }}</span> <bdi dir="auto">{{ failure.request }}</bdi></summary>
<div class="answers"><div>expected<pre>{{ expected }}</pre></div><div>{{ last }}<pre>{{ got }}</pre></div>
{% if failure.before %}<div>{{ first }}<pre>{{ failure.before }}</pre></div>{% endif %}</div></details>
{% endfor %}{% endcall %}{% endif %}
{% for title, pairs in [("Settings", args | items), ("Versions", (versions | items | list) + [("git", git)])] if data %}
{% call section(title) %}{{ listed("pairs", pairs) }}{% endcall %}{% endfor %}
{% if command %}{% call section("Repeat this run", "A click selects it all.") %}
<pre class="command" tabindex="0">{{ command | whole }}</pre>{% endcall %}{% endif %}
</main></body></html>
"""


def show_text(value: object, limit: int = SHOWN_CHARACTERS) -> object:
    """Return what the page shows for a value: a long text cut, and characters that act instead of showing by number."""
    if value is None or hasattr(value, "__html__"):
        return "–" if value is None else value
    text = str(value)
    rest = f"… {len(text) - limit:,} more characters" if len(text) > limit else ""
    return re.sub(INVISIBLE, lambda match: f"⟨U+{ord(match[0]):04X}⟩", text[:limit]) + rest


def mark_difference(expected: str, got: str) -> list:
    """Return both texts as markup: <ins> around what only `expected` has, <del> around what only `got` has."""
    cut = [show_text(text[:SHOWN_CHARACTERS]) for text in (expected, got)]
    left, right = (re.findall(r'[^\s"{}\[\],<>]+|\s+|.', text) for text in cut)
    marked = [Markup(""), Markup("")]
    for change, a, b, c, d in difflib.SequenceMatcher(None, left, right).get_opcodes():
        for side, tag, words in ((0, "ins", left[a:b]), (1, "del", right[c:d])):
            text = escape("".join(words))
            marked[side] += text if change == "equal" or not words else Markup(f"<{tag}>{text}</{tag}>")
    return [mark + show_text(text)[len(shown) :] for mark, text, shown in zip(marked, (expected, got), cut)]


def show_number(value: float | None) -> str | None:
    """Return a number with thousands separated, and three digits of one that is not whole."""
    if not isinstance(value, (int, float)):
        return None
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 999.5 else f"{value:.3g}"


def show_percent(share: float | None, digits: int = 0) -> str | None:
    """Return a share in percent with one decimal, which is left out when 0 unless `digits` asks for it."""
    return f"{100 * share:.1f}".removesuffix("" if digits else ".0") + " %" if share is not None else None


def draw_curve(history: list[dict], names: dict[str, str], show=show_number, top: float | None = None) -> dict:
    """Return the lines of a chart for the log's keys in `names`, in percent of its width and height."""
    logged = {
        key: [
            (entry["step"], entry[key])
            for entry in history
            if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
        ]
        for key in names
    }
    steps = max((entry["step"] for entry in history), default=1) or 1
    highest = max((value for points in logged.values() for _, value in points), default=1)
    unit = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1
    top = top or next(n * unit for n in (1, 1.5, 2, 3, 4, 6, 8, 10, 11) if n * unit >= highest)
    lines = []
    for key, points in logged.items():
        thin = points[:: -(len(points) // 400 + 1)]  # from the last; more points than pixels make the page heavy
        drawn = [f"{100 * step / steps:.2f},{100 - 100 * value / top:.2f}" for step, value in thin]
        if points:
            held = key.startswith("eval")
            lines.append(
                {
                    "kind": "held" if held else "fitted",
                    "name": names[key],
                    "last": show(points[-1][1]),
                    "points": Markup(" ".join(drawn)),
                    "dots": Markup("".join(f"M{point}h0" for point in drawn)) if held else "",
                }
            )
    return {"lines": lines, "top": show(top), "half": show(top / 2), "steps": steps}


def shade_confusion(confusion: dict) -> dict:
    """Return the rows and columns that hold a count, each cell as (kind, heat in percent, count)."""
    labels, counts = confusion["labels"], confusion["counts"]
    used = [column for column in range(len(labels)) if any(row[column] for row in counts)]
    rows = []
    for label, row in zip(labels, counts):
        if total := sum(row):
            kinds = ["" if not row[column] else "hit" if labels[column] == label else "miss" for column in used]
            heats = [12 + 30 * row[column] // total for column in used]  # at most 42: the text stays readable
            rows.append((label, list(zip(kinds, heats, (row[column] for column in used)))))
    return {"columns": [labels[column] for column in used], "rows": rows}


def render_report(report: dict) -> str:
    """Return the report of a run as one HTML page that needs nothing from outside; absent parts are left out."""
    page = Environment(autoescape=True, undefined=ChainableUndefined, finalize=show_text, trim_blocks=True)
    page.filters |= {
        "percent": show_percent,
        "number": show_number,
        "plural": plural,
        "share": lambda part: f"{100 * (part or 0):.1f}%",
        "breakable": lambda name: Markup("_<wbr>").join(show_text(name).split("_")),
        "whole": lambda text: Markup(escape(show_text(text, sys.maxsize))),
    }  # not cut: it is to be copied
    scores, train, tools = report.get("scores") or {}, report.get("train") or {}, report.get("per_tool") or {}
    first, last = (next(iter(names), None) for names in (scores, reversed(scores)))
    headline = " → ".join(show_percent(scores[name]["exact_match"]) for name in dict.fromkeys([first, last]) if name)
    curves = {
        "Loss": draw_curve(train.get("history") or [], {"loss": "training", "eval_loss": "held out"}),
        "Exact match": draw_curve(train.get("history") or [], {"eval_exact_match": "held out"}, show_percent, 1),
    }
    return page.from_string(REPORT_TEMPLATE).render(
        report,
        first=first,
        last=last,
        score_names=SCORE_NAMES,
        headline=headline + " of calls exact" if scores else "Trained, not measured",
        mark_difference=mark_difference,
        tools=sorted(tools.items(), key=lambda item: (item[1].get(last, {}).get("exact", 0), item[0])),
        curves={name: curve for name, curve in curves.items() if curve["lines"]},
        matrix=shade_confusion(report["confusion"]) if report.get("confusion") else {},
    )
