"""What a run prints: one line a stage, warnings, errors; secrets stay hidden."""

import difflib
import json
import os
import re
import sys

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from tool_calling.processes import is_main

SHOWN_PROBLEMS = 20
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # their values are written nowhere


class UserError(Exception):
    """A mistake in data or environment that the user can mend: shown as `error: ...` lines, never as a traceback."""


class FlagError(UserError):
    """A wrong flag, on the command line or in the file of --config: exit code 2 instead of 1."""


def hide_secrets(text: str) -> str:
    """Return a text without the secrets of the environment and without the passwords in addresses."""
    for name in SECRETS:
        if len(os.environ.get(name, "")) >= 8:  # shorter ones may be parts of words
            text = text.replace(os.environ[name], f"${name}")
    return re.sub(r"(?<=://)[^/\s@\"'\\]+@", "", text)


def say(stage: str, text: str) -> None:
    """Print one line for one stage of the run; if nobody reads any more, as after `| head`, the run goes on."""
    try:
        print(f"{stage:<9}{hide_secrets(text)}", flush=True)
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Let all that is printed from now on go nowhere, as the one who read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console(**settings):
    """Return a console of rich that goes on, as `say` does, if nobody reads any more; rich would end the process."""
    console = Console(highlight=False, **settings)
    console.on_broken_pipe = drop_output
    return console


def warn(text: str, kind: str = "warning") -> None:
    """Print one line on stderr."""
    if is_main():
        print(f"{kind}: {hide_secrets(text)}", file=sys.stderr, flush=True)


def plural(count: int, noun: str) -> str:
    """Return `1 row`, `2,000 rows` or `2 batches`."""
    return f"{count:,} {noun}{('es' if noun.endswith('ch') else 's') * (count != 1)}"


def list_first(names, limit: int) -> str:
    """Return `a, b, and 3 more`: the first names of an iterable, and how many follow."""
    names = [*names]
    return ", ".join(names[:limit]) + (f", and {len(names) - limit:,} more" if len(names) > limit else "")


def suggest(name: str, known) -> str:
    """Return the end of a message that names the nearest of the known names, if one is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as JSON for a message, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def report_problems(problems: list[tuple[str, str]], on_invalid: str, total: int, noun: str = "row") -> None:
    """Raise a UserError that lists the problems, or with on_invalid "skip" print every one as a warning."""
    if not problems:
        return
    rows = len({where for where, _ in problems})
    if on_invalid == "skip":
        for where, problem in problems:
            warn(f"{where}: {problem}", "skipped")
        say("skip", f"{rows:,} of {plural(total, noun)}, named above")
        return
    lines = [f"{where}: {problem}" for where, problem in problems[:SHOWN_PROBLEMS]]
    more = f", the first {SHOWN_PROBLEMS} above" if len(problems) > SHOWN_PROBLEMS else ""
    advice = "; mend them, or leave them out with --on_invalid skip" if noun == "row" else ""
    count = f"{plural(len(problems), 'problem')} in {rows:,} of {plural(total, noun)}"
    raise UserError("\n".join([*lines, count + more + advice]))


def cut_text(text: str, limit: int = 200) -> str:
    """Return a text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show_table(columns: list[str], rows: list[list]) -> None:
    """Print a table under the lines of `say`; all columns but the first are numbers."""
    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 2), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, *values in rows:
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    # Piped, the width would be taken for 80 whatever the reader has.
    console = make_console(width=None if sys.stdout.isatty() else 120)
    console.print(Padding(table, (0, 0, 0, 9), expand=False))
