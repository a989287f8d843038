"""What both programs share: assembly from a table of commands, exit codes, one-line errors and quiet ends."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done; 2 wrong input or options, explained in one line on standard error; 130 interrupted; "
    "143 ended by SIGTERM, training saved."
)
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The commands, ending quietly when whoever reads their output has gone, and in one line on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would flush standard output once more at the end and complain about the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            print(f"{ctx.info_name}: interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        return result


def command_group(name: str, help_text: str, no_arguments_is_help: bool = False) -> typer.Typer:
    """Create a program, or a group of commands below one, with the habits of this project."""
    return typer.Typer(
        name=name,
        cls=Commands,
        help=help_text,
        epilog=EXIT_CODES,
        no_args_is_help=no_arguments_is_help,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=CONTEXT_SETTINGS,
    )


def program(name: str, help_text: str, commands: Mapping[str, Sequence[ModuleType]]) -> typer.Typer:
    """Assemble a program from the modules of its commands.

    Args:
        name: of the program.
        help_text: what it is for.
        commands: heading in the help -> modules. A module is named after its command and has either a function of that
            name or, for a group of commands, an `application`.
    """
    application = command_group(name, help_text)

    @application.callback(invoke_without_command=True, help=help_text)
    def start(context: typer.Context, show_version: Annotated[bool, version_option(name)] = False) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    for heading, modules in commands.items():
        for module in modules:
            function_name = module.__name__.rpartition(".")[2]
            command_name = function_name.replace("_", "-")
            if hasattr(module, "application"):
                application.add_typer(module.application, name=command_name, rich_help_panel=heading)
            else:
                register = application.command(command_name, epilog=EXIT_CODES, rich_help_panel=heading)
                register(getattr(module, function_name))
    return application


def backend_lines() -> list[str]:
    """PyTorch's version, and each backend of the kernels with its state."""
    import torch  # noqa: PLC0415

    from mambacore import backends  # noqa: PLC0415

    try:
        states = [f"backend {name}: {state}" for name, state in backends().items()]
    except ImportError as error:
        states = [f"backend native: broken, {error}"]
    return [f"torch {torch.__version__}", *states]


def version_option(program_name: str) -> Any:
    """The option `--version` of a program."""

    def print_version(wanted: bool) -> None:
        if not wanted:
            return
        try:
            print(f"{program_name} {version('genomamba')}")
        except PackageNotFoundError:
            print(f"{program_name}, not installed and therefore of unknown version")
        for line in backend_lines():
            print(line)
        raise typer.Exit

    return typer.Option(
        "--version",
        callback=print_version,
        is_eager=True,
        help="Print the version and backends, and exit.",
    )


class Notes(logging.Handler):
    """Shows warnings of the packages as lines on standard error, whichever stream that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one warning."""
        from mambacore.safe_text import safe_for_terminal  # noqa: PLC0415

        print(safe_for_terminal(record.getMessage()), file=sys.stderr, flush=True)


def show_warnings() -> None:
    """Let warnings of the packages appear on standard error."""
    for name in ("mambacore", "genomamba", "audiomamba"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, Notes) for handler in logger.handlers):
            logger.addHandler(Notes())


def run_program(application: Callable[..., Any], program_name: str, arguments: Sequence[str] | None) -> int:
    """Run a command line; returns the exit code.

    Args:
        application: the program's commands.
        program_name: begins its messages.
        arguments: without the program's name; `None` takes those of the process.
    """
    show_warnings()
    try:
        application(args=None if arguments is None else list(arguments), prog_name=program_name)
    except ValueError as error:
        from mambacore.errors import InputError  # noqa: PLC0415
        from mambacore.safe_text import safe_for_terminal  # noqa: PLC0415

        if not isinstance(error, InputError):
            raise
        sentence = " ".join(str(error).split())
        print(f"{program_name}: error: {safe_for_terminal(sentence)}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0
