"""Chat templates that a user gives to a base: the bundled ones, files, and the tokens that they need."""

import re
from pathlib import Path

import jinja2

from tool_calling.terminal import FlagError, list_first

FOLDER = Path(__file__).parent
# The turns of a template, and what parsers of servers look up as single tokens: calls and thoughts.
TOKEN = re.compile(r"<\|[^\s|<>]+\|>|<(?:start|end)_\w+>|</?(?:tool_call|think)>")
COMMENT, GENERATION = re.compile(r"\{#.*?#\}", re.DOTALL), re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def list_bundled() -> list[str]:
    """Return the names of the templates that come with this package."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def read_template(name: str | None) -> str | None:
    """Return the text of a bundled template or of a file of Jinja; None for None.

    FlagError if there is none, or if it is not Jinja.
    """
    if name is None:
        return None
    what, path = f"--chat_template {name}", FOLDER / f"{name}.jinja" if name in list_bundled() else Path(name)
    if not path.is_file():
        expected = f"expected a file of Jinja, or a bundled one: {list_first(list_bundled(), 9)}"
        raise FlagError(f"{what}: no such file; {expected}")
    try:
        text = path.read_text(encoding="utf-8")
        # Transformers knows one tag more, which marks what the assistant writes.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", text))
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(f"{what}: cannot be read: {error}; expected a text of Jinja in UTF-8") from None
    except jinja2.TemplateSyntaxError as error:
        raise FlagError(f"{what}:{error.lineno}: is not Jinja: {error.message}") from None
    if not text.strip():
        raise FlagError(f"{what}: is empty; expected a chat template")
    return text


def check_name(name: str) -> str:
    """Return the name of a bundled template or the path of a file, if read_template takes it: an argparse type."""
    path = str(Path(name).expanduser())  # after "=" and in --config, no shell expands ~
    read_template(path)
    return path


def list_tokens(template: str) -> list[str]:
    """Return what a template writes that must be single tokens, in the order in which it first does."""
    return [*dict.fromkeys(TOKEN.findall(COMMENT.sub("", template)))]
