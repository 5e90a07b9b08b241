"""Reads files: .jsonl, .json and .csv, each also with .gz, and .parquet. Every record comes with its place.

Yields a BadRow for a record that cannot be read; a problem of a whole file raises StageFailed(data). Nothing is lost silently: no
duplicate key, nothing after the end of a list. Columnar files write nulls for absent values, and whole numbers as floats if other
values of the column have a fraction: both are reverted.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache, partial
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.values import DECODER, BadRow, Number, describe
from tuneline.errors import StageFailed
from tuneline.paths import suffix

Records = Iterator[tuple[str, Any]]  # (place, record or BadRow)
# Encodings of training data other than UTF-8: Western, Central and Eastern European, Near Eastern and East Asian.
ENCODINGS = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp932", "gb18030", "big5", "cp949"]
WESTERN = {*map(chr, range(128)), *"ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜàáâãäåæçèéêëìíîïñòóôõöøùúûüÿßŒœŠšŽž€¡¿«»‹›‘’‚“”„–—…·•°§ªº²³½¼£©®™´¨×\u00a0"}
SAMPLE = 200  # lines that are not UTF-8, by which the encoding is guessed


def file_records(file: Path) -> Records:
    readers = {".jsonl": jsonl_records, ".json": json_records, ".csv": csv_records}
    ending = suffix(file)
    if ending == ".parquet":
        yield from parquet_records(file)
        return
    if ending.removesuffix(".gz") not in readers:
        allowed = f"{', '.join(readers)} (each also with .gz), .parquet"
        raise StageFailed("config", f"{file}: found ending {ending or 'none'}, expected {allowed}")
    try:
        with opened(file) as content:
            yield from readers[ending.removesuffix(".gz")](file, content)
    except UnicodeDecodeError as error:
        raise StageFailed("data", *not_utf8(file, error)) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise StageFailed("data", f"{file}: found no complete gzip file ({error})", "fetch or pack it again") from error


def opened(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


# --- encodings --------------------------------------------------------------------------------------------------------


def not_utf8(file: Path, error: UnicodeDecodeError) -> tuple[str, str]:
    """Return the message, with the first faulty line, and the hint."""
    with opened(file) as lines:
        if next(lines, b"").startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return f"{file}: found UTF-16, expected UTF-8", "convert the file to UTF-8"
    number = next((number for number, _ in broken_lines(file)), 1)
    return f"{file}:{number}: found bytes that are not UTF-8 ({error})", to_utf8(file)


def broken_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not UTF-8, with their numbers."""
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                yield number, line


@lru_cache(maxsize=1)
def to_utf8(file: Path) -> str:
    """Return the hint for a file that is not UTF-8, with the most likely encoding."""
    from charset_normalizer import from_bytes

    sample = b"".join(line for _, line in islice(broken_lines(file), SAMPLE))
    found = from_bytes(sample, cp_isolation=ENCODINGS).best()
    if found is None:
        return "convert the file to UTF-8"
    # Western text is also valid Central European or Turkish text: the encodings share most letters.
    western = found.encoding in ("cp1250", "cp1254") and set(sample.decode("cp1252", "replace")) <= WESTERN
    encoding = "cp1252" if western else found.encoding
    return f"convert the file to UTF-8: it reads as {encoding} (`iconv -f {encoding} -t utf-8`)"


# --- text files -------------------------------------------------------------------------------------------------------


def jsonl_records(file: Path, lines: IO[bytes]) -> Records:
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise StageFailed("data", f"{file}: found UTF-16, expected UTF-8", "convert the file to UTF-8")
        if line.strip():
            record: Any
            try:
                record = DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # json would guess the encoding of bytes
            except UnicodeDecodeError as error:
                record = BadRow(f"found bytes that are not UTF-8 ({error})", to_utf8(file))
            except (ValueError, RecursionError) as error:
                record = BadRow(f"found no JSON ({error})", "a .jsonl file holds one object a line; `on_bad_row: drop` drops other lines")
            yield f"{file}:{number}", record


def json_records(file: Path, content: IO[bytes]) -> Records:
    """Decode the elements of one list one by one, so that each has its line."""
    text = content.read().decode("utf-8-sig")
    position, line, counted, number, of_line = skip_space(text, 0), 1, 0, 0, 0
    if text[position : position + 1] != "[":
        lines = text[position : position + 1] == "{" and "}\n{" in text.replace("\r", "")
        hint = "one object a line: name the file .jsonl" if lines else "write its list of rows alone, without the object around it"
        raise StageFailed("data", f"{file}:1: found no list, expected a list of objects", hint)
    position, first = skip_space(text, position + 1), True
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            if not first:
                if text[position : position + 1] != ",":
                    raise JSONDecodeError("Expecting ',' or ']'", text, position)
                position = skip_space(text, position + 1)
                line, counted = line + text.count("\n", counted, position), position
            record, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # numbers with too many digits, lists nested too deeply
            place = error.lineno if isinstance(error, JSONDecodeError) else line
            raise StageFailed("data", f"{file}:{place}: found no JSON ({error})", "check the file with `python -m json.tool`") from error
        number += 1
        yield f"{file}:{line}" + (f" (row {number})" if line == of_line else ""), record  # also for files in one line
        position, first, of_line = skip_space(text, position), False, line
    position = skip_space(text, position + 1)
    if position < len(text):
        line += text.count("\n", counted, position)
        message = f"{file}:{line}: found {describe(text[position:].rstrip())} after the end of the list, expected one list"
        raise StageFailed("data", message, "join the lists into one, or put each into its own file")


def skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def csv_records(file: Path, content: IO[bytes]) -> Records:
    """Yield rows as objects. An empty cell is no value. A row may span lines; its place is its first line."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            if not header:
                raise StageFailed("data", f"{file}:1: found no header, expected a first line with column names")
            if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
                message = f"{file}:1: found one column, {header[0]!r}, expected columns separated by commas"
                raise StageFailed("data", message, f"convert it, for example by csvkit's `csvformat -d {mark!r}`, or save it with commas")
            refuse_twice(f"{file}:1", header)
            if spaced := [name for name in header if name != name.strip()]:
                hint = "remove the spaces after its commas: they would be part of names and values"
                raise StageFailed("data", f"{file}:1: found the column {spaced[0]!r}, expected names without space around them", hint)
            for cells in filter(None, reader):
                place = f"{file}:{reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
                if len(cells) == len(header):
                    yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}
                else:
                    message = f"found {len(cells)} cells, expected {len(header)}, as in the header"
                    yield place, BadRow(message, "quote cells that hold commas or line ends, or set `on_bad_row: drop` in the source")
        except csv.Error as error:
            message = f"{file}:{reader.line_num}: found no CSV ({error})"
            raise StageFailed("data", message, "quote cells that hold quotes or line ends") from error


def refuse_twice(place: str, columns: list[str]) -> None:
    if twice := sorted(name for name, count in Counter(columns).items() if count > 1):
        raise StageFailed("data", f"{place}: found the column {twice[0]} twice, expected once", "give each column a different name")


# --- columnar files ---------------------------------------------------------------------------------------------------


def parquet_records(file: Path) -> Records:
    number = 0
    try:
        table = pq.ParquetFile(file)
        refuse_twice(str(file), table.schema_arrow.names)
        shown = plain(table.schema_arrow)
        maps = {"maps_as_pydicts": "strict"} if "map<" in str(table.schema_arrow.types) else {}  # slower, so only if there is a map
        for batch in table.iter_batches(batch_size=1000):
            for record in rows_of_batch(batch, **maps):
                number += 1
                yield f"{file}: row {number}", record if isinstance(record, BadRow) else shown(record)
    except (pa.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise StageFailed("data", f"{file}: found no parquet{after} ({error})", "fetch or write it again") from error


def rows_of_batch(batch: pa.RecordBatch, **maps: str) -> Iterator[Any]:
    try:
        yield from batch.to_pylist(**maps)
    except (ValueError, KeyError, OverflowError):  # not UTF-8, a duplicate key, a date out of Python's range
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist(**maps)
            except (ValueError, KeyError, OverflowError) as error:
                yield BadRow(f"found a value that cannot be read ({error})")


def plain(schema: pa.Schema) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that restores a columnar record as it was written: without added nulls, with 3 for 3.0."""
    columns = [(name, fix) for name, fix in zip(schema.names, map(restorer, schema.types), strict=True) if fix is not None]

    def shown(record: dict[str, Any]) -> dict[str, Any]:
        for name, fix in columns:
            if record[name] is not None:
                record[name] = fix(record[name])
        return record

    return shown


def restorer(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return the function that restores a value of this type; None if it needs no change."""
    if pa.types.is_floating(kind):
        return partial(number, width=kind.to_pandas_dtype())
    if pa.types.is_decimal(kind):
        return decimal
    if pa.types.is_struct(kind):
        parts = [(kind.field(i).name, fix) for i in range(kind.num_fields) if (fix := restorer(kind.field(i).type)) is not None]
        return partial(struct, parts)
    if pa.types.is_map(kind):
        each = restorer(kind.item_type)
        return each and partial(mapping, each)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        each = restorer(kind.value_type)
        return each and partial(sequence, each)
    return None


def mapping(fix: Callable[[Any], Any], value: dict[str, Any]) -> dict[str, Any]:
    return {name: item if item is None else fix(item) for name, item in value.items()}


def sequence(fix: Callable[[Any], Any], value: list[Any]) -> list[Any]:
    return [item if item is None else fix(item) for item in value]


def struct(parts: list[tuple[str, Callable[[Any], Any]]], value: dict[str, Any]) -> dict[str, Any]:
    for name, fix in parts:
        if value[name] is not None:
            value[name] = fix(value[name])
    if None in value.values():
        for name in [name for name, item in value.items() if item is None]:
            del value[name]
    return value


def number(value: float, width: type[np.floating[Any]] = np.float64) -> float | int | None:
    """Return the value with as few digits as a float of this width needs; None for NaN, which is how pandas writes an absent value."""
    if value != value:
        return None
    if value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if width is np.float64 else float(str(width(value)))


def decimal(value: Decimal) -> int | Number:
    return int(value) if value.as_tuple().exponent == 0 else Number(str(value))
