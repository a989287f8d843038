"""The reference of the commands: one page per command, from the definitions that `--help` prints."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import typer

from mambapipelines.cli.audiomamba import main as audio
from mambapipelines.cli.genomamba import main as dna

PROGRAMS = {"genomamba": dna, "audiomamba": audio}


@cache
def command_pages() -> list[tuple[str, str, str]]:
    """The path, title and text of each page."""
    pages = []
    for program, module in PROGRAMS.items():
        group = typer.main.get_command(module.application)
        commands = list(_commands(program, group))
        rows = "".join(f"| [`{name}`]({_file(name)}) | {_first_sentence(command)} |\n" for name, command in commands)
        overview = f"# {program}\n\n{group.help}\n\n| command | purpose |\n| --- | --- |\n{rows}\n{group.epilog}\n"
        pages.append((f"reference/commands/{program}.md", program, overview))
        pages += [(f"reference/commands/{_file(name)}", name, _page(name, command)) for name, command in commands]
    return pages


def _commands(name: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its full name."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(f"{name} {word}", command)
        else:
            yield f"{name} {word}", command


def _file(name: str) -> str:
    return name.replace(" ", "-") + ".md"


def _first_sentence(command: Any) -> str:
    return (command.help or "").strip().split("\n\n")[0].replace("\n", " ")


def _page(name: str, command: Any) -> str:
    """One command: usage, help, arguments and options."""
    arguments = [entry for entry in command.params if entry.param_type_name == "argument"]
    options = [entry for entry in command.params if entry.param_type_name == "option" and not entry.hidden]
    usage = " ".join([name, "[OPTIONS]", *(_metavar(entry) for entry in arguments)])
    text = f"# {name}\n\n    {usage}\n\n{command.help}\n"
    if arguments:
        text += "\n## Arguments\n\n| argument | meaning |\n| --- | --- |\n"
        text += "".join(f"| `{_escaped(_metavar(entry))}` | {_escaped(entry.help or '')} |\n" for entry in arguments)
    text += "\n## Options\n\n| option | meaning | default |\n| --- | --- | --- |\n"
    for entry in options:
        spelled = ", ".join(f"`{word}`" for word in [*entry.opts, *entry.secondary_opts])
        value = "" if entry.is_flag else f" `{_escaped(_metavar(entry))}`"
        text += f"| {spelled}{value} | {_escaped(entry.help or '')} | {_escaped(_default(entry))} |\n"
    return text + f"\n{command.epilog or ''}\n"


def _metavar(entry: Any) -> str:
    if entry.metavar:
        return str(entry.metavar)
    kinds = {"Path": "PATH", "int": "INTEGER", "float": "NUMBER", "str": "TEXT"}
    annotation = getattr(entry.type_descriptor, "annotation", str)
    return kinds.get(getattr(annotation, "__name__", ""), "TEXT")


def _default(entry: Any) -> str:
    if entry.required:
        return "required"
    if isinstance(entry.show_default, str):
        return entry.show_default
    if entry.default is None or entry.default is False or callable(entry.default) or entry.default == []:
        return ""
    if entry.is_flag and entry.secondary_opts:
        return f"`{(entry.opts if entry.default else entry.secondary_opts)[0]}`"
    return f"`{entry.default}`"


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
