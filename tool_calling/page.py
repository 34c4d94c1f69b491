"""The report as one HTML page."""

import difflib
import math
import re
import sys
from functools import partial
from pathlib import Path

from jinja2 import ChainableUndefined, Environment
from markupsafe import Markup, escape

from tool_calling.terminal import plural

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_CHARACTERS = 2000  # of each text; of the rest only the length is shown
# Of rows that a server answers otherwise, and of labels in doubt; and those of each list that are open at first.
LIMITS = {"SHOWN_ROWS": 10, "SHOWN_DOUBTS": 300, "OPENED": 3}
SCORE_NAMES = {
    "exact_match": "exact",
    "call_exact": "exact, call expected",
    "no_call": "no call, none expected",
    "ast_match": "AST, BFCL-like",
    "tool_macro_f1": "tool macro-F1",
    "call_precision": "call precision",
    "call_recall": "call recall",
    "broken_json": "broken calls",
}
TRIAL_NAMES = {  # held-out requests with other lists of tools, see editions.py
    "shuffled": "exact, shuffled list",
    "missing": "no call, tool missing",
    "masked": "exact, masked names",
    "unseen": "exact, unseen tools",
}
INVISIBLE = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"


def render_report(report: dict) -> str:
    """Return the report of a run as an HTML page that loads nothing from outside; it leaves out absent parts."""
    page = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    page.finalize = show_text
    page.filters |= {
        "percent": show_percent,
        "number": show_number,
        "plural": plural,
        "share": lambda part: f"{100 * (part or 0):.1f}%",
        "breakable": lambda name: Markup("_<wbr>").join(show_text(name).split("_")),
        "whole": lambda text: Markup(escape(show_text(text, sys.maxsize))),  # it is there to be copied
    }
    functions = (draw_curve, list_scores, list_servers, mark_difference, shade_confusion, show_interval, show_percent)
    page.globals |= {function.__name__: function for function in functions} | LIMITS
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report)


def show_text(value: object, limit: int = SHOWN_CHARACTERS) -> object:
    """Return what the page shows for a value: a long text is cut, an invisible character shown by its number."""
    if value is None or hasattr(value, "__html__"):
        return "–" if value is None else value
    text = str(value)
    rest = f"… {len(text) - limit:,} more characters" if len(text) > limit else ""
    return re.sub(INVISIBLE, lambda match: f"⟨U+{ord(match[0]):04X}⟩", text[:limit]) + rest


def is_number(value: object) -> bool:
    """Say whether a value can be shown as a number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def show_number(value: float | None) -> str | None:
    """Return a number with separated thousands; if it is not whole, with three digits."""
    if not is_number(value):
        return None
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 999.5 else f"{value:.3g}"


def show_percent(share: float | None, digits: int = 0) -> str | None:
    """Return a share in percent with one decimal, which is left out when 0 unless `digits` asks for it."""
    return f"{100 * share:.1f}".removesuffix("" if digits else ".0") + " %" if share is not None else None


def show_interval(interval: list[float] | None) -> str:
    """Return the ends of the interval of a share in percent."""
    return "–".join(f"{100 * end:.1f}" for end in interval or ())


def list_scores(
    scores: dict[str, dict], trials: dict[str, dict] | None = None
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return (name, rows, [(value, interval) of each model]) of each score as texts; rows only if all models agree.

    Those of `trials`, {kind: {model: its scores}}, come last; not all models have some.
    """
    lines = []
    for key, name in SCORE_NAMES.items():
        rows = {score["rows"].get(key) for score in scores.values()}
        show = str if key == "broken_json" else partial(show_percent, digits=1)
        cells = [(show(score[key]) or "–", show_interval(score["interval"].get(key))) for score in scores.values()]
        lines.append((name, show_number(rows.pop()) or "" if len(rows) == 1 else "", cells))
    for kind, name in TRIAL_NAMES.items():
        if found := (trials or {}).get(kind):
            shown = [found.get(model, {"exact_match": None, "interval": {}}) for model in scores]
            shares = (show_percent(score["exact_match"], 1) or "–" for score in shown)
            intervals = (show_interval(score["interval"].get("exact_match")) for score in shown)
            lines.append((name, show_number(next(iter(found.values()))["n"]), [*zip(shares, intervals)]))
    return lines


def list_servers(served: dict | None, check: dict | None) -> dict[str, dict]:
    """Return {server: how it agrees with a model here} of those of --eval_only and that of --serve_check."""
    servers = (served or {}) | ({check["server"]: check} if check else {})
    return {name: agreement for name, agreement in servers.items() if "against" in agreement}


def mark_difference(expected: str, got: str) -> list[Markup]:
    """Return both texts as markup: <ins> around what only `expected` has, <del> around what only `got` has."""
    cut = [show_text(text[:SHOWN_CHARACTERS]) for text in (expected, got)]
    left, right = (re.findall(r'[^\s"{}\[\],<>]+|\s+|.', text) for text in cut)
    marked = [Markup(""), Markup("")]
    for change, a, b, c, d in difflib.SequenceMatcher(None, left, right).get_opcodes():
        for side, tag, words in ((0, "ins", left[a:b]), (1, "del", right[c:d])):
            text = escape("".join(words))
            marked[side] += text if change == "equal" or not words else Markup(f"<{tag}>{text}</{tag}>")
    return [mark + show_text(text)[len(shown) :] for mark, text, shown in zip(marked, (expected, got), cut)]


def draw_curve(history: list[dict], names: dict[str, str], show=show_number, top: float | None = None) -> dict:
    """Return the lines of a chart for the keys of the log in `names`; points are in percent of its width and height."""
    logged = {key: [(entry["step"], entry[key]) for entry in history if is_number(entry.get(key))] for key in names}
    steps = max((entry["step"] for entry in history), default=1) or 1
    highest = max((value for points in logged.values() for _, value in points), default=1)
    unit = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1
    top = top or next(n * unit for n in (1, 1.5, 2, 3, 4, 6, 8, 10, 11) if n * unit >= highest)
    lines = []
    for key, points in logged.items():
        if not points:
            continue
        thin = points[:: -(len(points) // 400 + 1)]  # from the last; more points than pixels make the page heavy
        drawn = [f"{100 * step / steps:.2f},{100 - 100 * value / top:.2f}" for step, value in thin]
        held_out = key.startswith("eval")
        line = {"kind": "held" if held_out else "fitted", "name": names[key], "last": show(points[-1][1])}
        line["points"] = Markup(" ".join(drawn))
        line["dots"] = Markup("".join(f"M{point}h0" for point in drawn)) if held_out else ""
        lines.append(line)
    return {"lines": lines, "top": show(top), "half": show(top / 2), "steps": steps}


def shade_confusion(confusion: dict) -> dict:
    """Return the columns and rows that hold a count, each cell as (kind, heat in percent, count)."""
    labels, counts = confusion["labels"], confusion["counts"]
    used = [column for column in range(len(labels)) if any(row[column] for row in counts)]
    rows = []
    for label, row in zip(labels, counts):
        if total := sum(row):
            kinds = ["" if not row[column] else "hit" if labels[column] == label else "miss" for column in used]
            heats = [12 + 30 * row[column] // total for column in used]  # at most 42: the text stays readable
            rows.append((label, list(zip(kinds, heats, (row[column] for column in used)))))
    return {"columns": [labels[column] for column in used], "rows": rows}
