"""Whoever writes a table, a page or a line for a terminal makes strangers' names safe; a new writer cannot forget it.

A row of a table is made by `mambacore.safe_text.table_line`, a line on a stream by `mambapipelines.console`, HTML by
`mambapipelines.pages.html`. Whatever puts tabs or tags between values by itself is found here, by its syntax.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels/mambacore", "genomamba", "audiomamba", "pipelines/mambapipelines")

# Where it is done by hand, and why that is safe.
TABS_ALLOWED = {
    "kernels/mambacore/safe_text.py": "table_line itself",
    "genomamba/io/reference_index.py": "an index of a genome, which programs read",
    "pipelines/mambapipelines/language/track.py": "a line per base; the contig is made safe once",
    "pipelines/mambapipelines/language/score_variants.py": "a record of VCF goes on as it came",
    "pipelines/mambapipelines/species/processes.py": "between processes, not for people",
}
STREAMS_ALLOWED = {
    "pipelines/mambapipelines/console.py": "note and show",
    "pipelines/mambapipelines/cli/program.py": "before anything is imported; uses safe_for_terminal",
    "kernels/mambacore/benchmarking.py": "figures of benchmarks",
}
TAGS_ALLOWED = {
    "pipelines/mambapipelines/pages/html.py": "the one place for HTML; a test of it tries hostile texts",
    "pipelines/mambapipelines/apps/server.py": "a paragraph and a player, escaped",
}
TAG = re.compile(r"</?[a-z]+[\s>]")


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for root in PACKAGES:
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            name = path.relative_to(REPOSITORY).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield name, node


def _constant(node: ast.AST) -> str:
    value = node.value if isinstance(node, ast.Constant) else ""
    return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _joins_values_with(node: ast.AST, pattern: re.Pattern[str]) -> bool:
    """Whether an f-string, a `join`, a `%` or a `format` puts values beside text in which the pattern is found."""
    if isinstance(node, ast.JoinedStr):
        has_values = any(isinstance(part, ast.FormattedValue) for part in node.values)
        return has_values and any(pattern.search(_constant(part)) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        return any(pattern.search(_constant(side)) for side in (node.left, node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "format"):
        literal = not (node.args and isinstance(node.args[0], ast.Constant))
        return literal and bool(pattern.search(_constant(node.func.value)))
    return False


def _found(pattern: re.Pattern[str], allowed: dict[str, str]) -> list[str]:
    found = [(name, node) for name, node in nodes() if _joins_values_with(node, pattern)]
    assert {name for name, _ in found} >= set(allowed), "an exception has no reason any more"
    return [f"{name}:{node.lineno}" for name, node in found if name not in allowed]  # type: ignore[attr-defined]


def test_rows_of_tables_are_made_by_table_line() -> None:
    assert _found(re.compile("\t"), TABS_ALLOWED) == []


def test_html_is_made_in_one_place() -> None:
    assert _found(TAG, TAGS_ALLOWED) == []


def test_lines_for_people_go_through_the_console() -> None:
    found = []
    for name, node in nodes():
        if isinstance(node, ast.Call) and name not in STREAMS_ALLOWED:
            called = ast.unparse(node.func)
            if called in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo"):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_the_finder_finds() -> None:
    for source in ('f"{a}\\t{b}"', '"\\t".join(cells)', 'b"\\t".join(cells)', '"%s\\t%s" % (a, b)', 'a + "\\t" + b'):
        assert any(_joins_values_with(node, re.compile("\t")) for node in ast.walk(ast.parse(source))), source
    assert not any(_joins_values_with(node, re.compile("\t")) for node in ast.walk(ast.parse('a.split("\\t")')))
