"""What a run prints: one line per stage, warnings and errors, with secrets hidden."""

import difflib
import json
import os
import re
import sys
import time

from rich.console import Console

from tool_calling.processes import is_main

SHOWN_PROBLEMS = 20
# Variables whose values are never written.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")


class UserError(Exception):
    """A mistake in data or environment that the user can fix; shown as `error: ...` lines without a traceback."""


class FlagError(UserError):
    """A wrong flag, on the command line or in the file of --config: exit code 2 instead of 1."""


def hide_secrets(text: str) -> str:
    """Return a text without the secrets of the environment and without passwords in URLs."""
    for name in SECRETS:
        if len(os.environ.get(name, "")) >= 8:  # shorter ones may be parts of words
            text = text.replace(os.environ[name], f"${name}")
    return re.sub(r"(?<=://)[^/\s@\"'\\]+@", "", text)


def print_safely(text: str) -> None:
    """Print a text without secrets; a reader that is gone, as after `| head`, does not end the run."""
    try:
        print(hide_secrets(text), flush=True)
    except BrokenPipeError:
        drop_output()


def say(stage: str, text: str) -> None:
    """Print one line for a stage of the run."""
    print_safely(f"{stage:<9}{text}")


class Watch:
    """The seconds that each stage of a run takes, from the one noted before it to its own end."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def note(self, stage: str) -> None:
        """Note that a stage ends now."""
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now

    def show(self) -> None:
        """Print all stages in one line."""
        parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.seconds.items())
        say("time", f"{sum(self.seconds.values()):.0f} s: {parts}")


def drop_output() -> None:
    """Redirect stdout to os.devnull after a broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console(**settings) -> Console:
    """Return a rich Console that survives a broken pipe as `say` does; rich itself would exit."""
    console = Console(highlight=False, **settings)
    console.on_broken_pipe = drop_output
    return console


def warn(text: str, kind: str = "warning", everywhere: bool = False) -> None:
    """Print one line on stderr, from the main process only unless what it says concerns this one alone."""
    if everywhere or is_main():
        print(f"{kind}: {hide_secrets(text)}", file=sys.stderr, flush=True)


def plural(count: int, noun: str) -> str:
    """Return `1 row`, `2,000 rows` or `2 batches`."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def list_first(names, limit: int) -> str:
    """Return the first names of an iterable and the number of the others: `a, b, and 3 more`."""
    names = [*names]
    more = f", and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def suggest(name: str, known) -> str:
    """Return `; did you mean x?` for the most similar known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def cut_text(text: str, limit: int = 200) -> str:
    """Return a text on one line, cut to `limit` characters with an ellipsis."""
    line = " ".join(filter(None, map(str.strip, re.split(r"[\r\n]", text))))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as JSON for a message, cut to `limit` characters."""
    return cut_text(json.dumps(value, ensure_ascii=False, default=str), limit)


def report_problems(problems: list[tuple[str, str]], on_invalid: str, total: int, noun: str = "row") -> None:
    """Raise a UserError that lists the problems, pairs of source and text; if on_invalid is "skip", warn of each."""
    if not problems:
        return
    lines = [f"{source}: {problem}" for source, problem in dict.fromkeys(problems)]  # of a repeated row: once
    share = f"{len({source for source, _ in problems}):,} of {plural(total, noun)}"
    if on_invalid == "skip":
        for line in lines:
            warn(line, "skipped")
        say("skip", f"{plural(len(lines), 'problem')} in {share}, named above")
        return
    more = f", the first {SHOWN_PROBLEMS} above" if len(lines) > SHOWN_PROBLEMS else ""
    advice = "; fix them or skip these rows with --on_invalid skip" if noun == "row" else ""
    raise UserError("\n".join([*lines[:SHOWN_PROBLEMS], f"{plural(len(lines), 'problem')} in {share}{more}{advice}"]))
