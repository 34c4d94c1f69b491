"""Rows of files, folders and Hugging Face datasets, each with its file:line."""

import contextlib
import csv
import gzip
import heapq
import json
import math
import os
import re
import sys
import zlib
from functools import partial
from itertools import chain, count
from operator import itemgetter
from pathlib import Path

from rich.progress import wrap_file

from tool_calling.data.literals import explain, parse_literal, read_value
from tool_calling.files import digest
from tool_calling.terminal import UserError, list_first, plural, say, shorten

ROW_FILES = re.compile(r".*\.((jsonl?|csv|tsv)(\.gz)?|parquet)", re.IGNORECASE | re.DOTALL)  # what is read of a folder
ROW_KINDS = "JSON, JSONL, CSV or Parquet"
NOT_ROWS = ("tools.json", "dataset_info.json", "dataset_infos.json", "state.json", "package.json")
PACKED = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zX": "xz"}  # by first bytes
COLUMNS = set(  # a table without any of these is not one of rows
    "messages conversations conversation dialogue dialog turns trajectory traj contents prompt completion input output "
    "query answers chat question answer instruction response".split()
)
TEXT_COLUMNS = set("input output prompt completion instruction question query answer response context system".split())
# Of a turn, or of a native output
READ_KEYS = {"role", "from", "type", "function_call", "function_calls", "tool_calls"}
PYTHON_VALUE = re.compile(r"\s*[\[{]+\s*'")  # as pandas writes a list or a dict into a cell
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.+-]+)(?=:))?(?::(?P<split>\w[\w.]*))?", re.ASCII
)
FILE_NAME = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|ya?ml|gz|zip|zst)", re.IGNORECASE)
SHARE = re.compile(r"(?P<path>.+):(?P<times>\d+(\.\d*)?|\.\d+)", re.ASCII | re.DOTALL)
MOST_TIMES = 1000
BETWEEN = re.compile(r"\s*,?\s*")  # elements of an array
SHOWN_COLUMNS = 8
SHOWN_BYTES = 2**26  # a larger file takes seconds to read: on a terminal a bar is shown


@contextlib.contextmanager
def open_file(path: str):
    """Yield a regular file opened for its bytes, unpacked if it is gzip; one that cannot be read is a UserError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
            raise UserError(f"{path}: is not a regular file; expected {ROW_KINDS}")
        with open(path, "rb") as raw, show_reading(raw) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def check_start(path: str, start: bytes) -> None:
    """Refuse a compressed file, a binary file, and one that is not what its name says."""
    if kind := next((kind for mark, kind in PACKED.items() if start.startswith(mark)), None):
        raise UserError(f"{path}: is {kind}; expected {ROW_KINDS}, or gzip: unpack it first")
    if path.lower().endswith(".parquet") and start:
        raise UserError(f"{path}: is not Parquet, as its name says; expected {ROW_KINDS}")
    if wide := re.search(rb"[\0\xfe\xff]", start):  # UTF-16, or no text at all
        raise UserError(f"{path}: not UTF-8 text (byte {wide.start()}); save it as UTF-8 JSON or JSONL")


def read_text(file) -> str:
    """Return the text of an open file; one that is empty or not UTF-8 is a UserError."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: {explain(error)}") from None
    if not text.strip():
        raise UserError(f"{file.name}: is empty; expected a JSON array of rows, or one JSON object a line")
    return text


def read_array(path: str, text: str):
    """Yield (file:line, element) of a JSON array, or of objects one after the other."""
    position = len(text) - len(text.lstrip())
    is_array = text.startswith("[", position)
    position, line, counted, last_line = position + is_array, 1, 0, 0
    for index in count():
        position = BETWEEN.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        source = f"{path}:{line}" if line > last_line else f"{path}[{index}]"  # several on one line: count them
        last_line = line
        if position == len(text) or (is_array and text[position] == "]"):
            break
        try:
            element, position = read_value(text, position)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", position))
            raise UserError(f"{path}:{line}: {explain(error)}") from None
        yield source, element
    if is_array and position == len(text):
        raise UserError(f"{source}: the JSON array does not end; expected ]")
    if is_array and text[position + 1 :].strip():
        raise UserError(f"{path}:{line}: more follows the ] of the array; expected the end of the file")


def read_lines(path: str, file):
    """Yield (file:line, object) of an open JSONL file, line by line; a broken line is yielded as its ValueError."""
    for line, content in enumerate(file, start=1):  # the lines of bytes end at \n alone: U+2028 in a text is data
        try:
            text = content.decode("utf-8-sig").strip()
            if not text:
                continue
            row, end = read_value(text)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except UnicodeDecodeError as error:
            row = ValueError(explain(error))
        except (ValueError, RecursionError) as error:
            row = ValueError(f"{explain(error)}; expected one JSON object a line, or a JSON array")
        yield f"{path}:{line}", row


def is_unfinished(line: bytes) -> bool:
    """Return whether an object that begins in this line may go on in the next, as in pretty-printed JSON."""
    text = line.decode("utf-8", "replace").rstrip()
    try:
        read_value(text)
        return False
    except (ValueError, RecursionError) as error:
        return line.endswith(b"\n") and getattr(error, "pos", -1) >= len(text)


def show_reading(file):
    """Return a context with the open file; on a terminal a bar shows how far a large one has been read."""
    size = os.fstat(file.fileno()).st_size
    shown = size >= SHOWN_BYTES and sys.stdout.isatty()
    return wrap_file(file, size, description="read", transient=True) if shown else contextlib.nullcontext(file)


def check_columns(path: str, names: list[str]) -> None:
    """Refuse a table with duplicate column names or without any of COLUMNS."""
    if len({*names}) < len(names):
        raise UserError(f'{path}: two columns are called "{max(names, key=names.count)}"; expected one')
    if COLUMNS.isdisjoint(names):
        expected = 'expected those of a format, as "messages" and "tools"'
        raise UserError(f"{path}: has the columns {list_first(map(shorten, names), SHOWN_COLUMNS)}; {expected}")


def read_cell(name: str, cell: str) -> str:
    """Return a cell with a Python list or dict in it as JSON text, which the formats read; any other as it is.

    A text to train may be such a value itself: in TEXT_COLUMNS only turns and calls are read.
    """
    if PYTHON_VALUE.match(cell):
        with contextlib.suppress(ValueError, RecursionError):
            value = parse_literal(cell, "a cell is")
            parts = value if isinstance(value, list) else [value]
            if name not in TEXT_COLUMNS or all(isinstance(part, dict) and READ_KEYS & part.keys() for part in parts):
                return json.dumps(value, ensure_ascii=False)
    return cell


def read_csv(path: str, file):
    """Yield (file:line, {column: text}) of an open CSV or TSV file with a header, without empty cells."""
    first = file.readline()
    file.seek(0)
    csv.field_size_limit(2**31 - 1)
    delimiter = max(",\t;", key=lambda mark: first.count(mark.encode()))
    lines = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(file))
    cells = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(cells)
        check_columns(path, header)
        line = cells.line_num + 1
        for row in cells:
            source, line = f"{path}:{line}", cells.line_num + 1
            if len(row) == len(header):
                yield source, {name: read_cell(name, cell) for name, cell in zip(header, row) if name and cell}
            elif row:  # a blank line has no cell
                yield source, ValueError(f"has {plural(len(row), 'cell')}; the header has {len(header):,}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{cells.line_num + 1}: not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{path}:{cells.line_num}: not valid CSV: {error}") from None


def read_json(path: str, file):
    """Yield (file:line, row) of an open JSON or JSONL file; the first character that is not blank decides which.

    JSONL of any size is read line by line; an array, or objects that span several lines, are read whole.
    """
    lines = (line.removeprefix(b"\xef\xbb\xbf").lstrip() for line in iter(partial(file.readline, 2**16), b""))
    first, second = next(filter(None, lines), b""), next(filter(None, lines), b"")
    file.seek(0)
    if not first or first.startswith(b"["):
        return read_array(path, read_text(file))
    if is_unfinished(first):
        objects = read_array(path, read_text(file))
        try:
            return chain([next(objects)], objects)
        except UserError:  # a line that was cut is one bad row, and the others can be read
            if second and not second.startswith(b"{"):  # no row follows: the mistake is inside an object
                raise
            file.seek(0)
    return read_lines(path, file)


def read_file(path: str):
    """Yield the (source, row) pairs of a file; what it begins with says what it is, and for text its name."""
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        start = file.read(4)
        file.seek(0)
        if start == b"PAR1":
            from tool_calling.data.tables import read_parquet  # here, because its library takes a while to import

            pairs = read_parquet(path, check_columns)
        else:
            check_start(path, start)
            first = start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
            is_table = re.search(r"\.[ct]sv(\.gz)?$", path, re.IGNORECASE) and first not in (b"", b"{", b"[")
            pairs = (read_csv if is_table else read_json)(path, file)
        yield from pairs
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: changed while it was read; start again when nothing writes to it")


def find_files(folder: str, tools_path: str | None) -> list[str]:
    """Return the ROW_FILES in a folder and its folders, sorted, but no hidden ones, NOT_ROWS or tools."""
    tools = tools_path and Path(tools_path).resolve()
    found = [
        str(path)
        for path in sorted(Path(folder).rglob("*"))
        if ROW_FILES.fullmatch(path.name)
        and path.name not in NOT_ROWS
        and not path.is_dir()
        and path.resolve() != tools
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(f"{folder}: holds no file of rows; expected .json, .jsonl, .csv, .tsv (also .gz) or .parquet")
    return found


def match_hub(path: str) -> re.Match | None:
    """Return the name, config and split of a Hub dataset; None for a path that exists or is named like a file."""
    match = HUB_NAME.fullmatch(path)
    is_file = match and (FILE_NAME.fullmatch(match["name"]) or any(map(os.path.exists, (path, match["name"]))))
    return None if is_file else match


def read_source(path: str, tools_path: str | None):
    """Yield the (source, row) pairs of a file, of the files in a folder, or a Hub dataset `name[[:config]:split]`."""
    if match := match_hub(path):
        from tool_calling.data.hub_rows import read_hub  # here, because its library takes seconds to import

        readers = {path: read_hub(**match.groupdict())}
    else:
        readers = {file: read_file(file) for file in (find_files(path, tools_path) if os.path.isdir(path) else [path])}
    for name, pairs in readers.items():
        first = next(pairs, None)
        if not first:
            raise UserError(f"{name}: holds no rows")
        yield from chain([first], pairs)


def name_file(source: str) -> str:
    """Return the file, or the split of a dataset, that a row comes from."""
    return re.sub(r"(:\d+|\[\d+\])$", "", source)


def hash_row(purpose: str, index: int, pair: tuple) -> str:
    """Return the hash that decides whether a row is chosen; a broken row is hashed by its index."""
    try:
        return digest([purpose, pair[1]])
    except (TypeError, RecursionError):
        return digest([purpose, index])


def split_share(path: str) -> tuple[str, float]:
    """Split `path[:times]` into the path and how often to take its rows; an existing file keeps its name."""
    match = SHARE.fullmatch(path)
    if not match or os.path.exists(path):
        return path, 1
    if not 0 < (times := float(match["times"])) <= MOST_TIMES:
        raise UserError(f"{path}: expected a share of its rows, as :0.3, or a repetition up to :{MOST_TIMES:,}")
    return match["path"], times


def read_share(path: str, tools_path: str | None, shown: bool):
    """Yield the (source, row) pairs of `path[:times]` that often; hashes choose the rows of a last, partial turn."""
    (name, times), taken = split_share(path), 0
    for turn in range(math.ceil(times)):
        for total, pair in enumerate(read_source(name, tools_path), start=1):
            if turn + 1 <= times or int(hash_row("share", total, pair)[:12], 16) < (times - turn) * 16**12:
                taken += 1
                yield pair
    if not taken:
        raise UserError(f"{path}: takes none of {plural(total, 'row')}; expected a larger share")
    if shown:
        say("read", f"{path}: {plural(taken, 'row')} of {total:,}")


def read_rows(paths: list[str], max_samples: int | None = None, tools_path: str | None = None):
    """Yield the (source, row) pairs of files, folders and Hub datasets, each `path[:times]`.

    What exists as a path is never looked up on the Hub. A broken line is yielded as a ValueError in place of its row.
    `max_samples` of all rows are yielded in their order: those with the smallest hashes, so that the place of a row
    does not matter, and a larger number only adds rows.
    """
    shown = any(split_share(path)[0] != path for path in paths)
    pairs = chain.from_iterable(read_share(path, tools_path, shown) for path in paths)
    if max_samples is None:
        yield from pairs
    else:  # holds no more rows than it yields
        chosen = heapq.nsmallest(max_samples, enumerate(pairs), key=lambda item: hash_row("max_samples", *item))
        for _, pair in sorted(chosen, key=itemgetter(0)):
            yield pair
