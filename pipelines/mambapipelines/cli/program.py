"""The framework of both programs: assembly from a table of commands, exit codes and one-line errors."""

import errno
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mambapipelines import VERBOSITY_VARIABLE
from mambapipelines.cli.conventions import Program, QuietOption, VerboseOption, is_verbose, set_verbosity
from mambapipelines.cli.topics import TOPICS
from mambapipelines.processes import signals_raise

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 success; 2 invalid input or options, explained in one line on standard error; 130 interrupted; "
    "143 terminated by SIGTERM and 129 by SIGHUP, training saved."
)
NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What PyTorch's allocator says on a CPU."""
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """A group of commands that exit quietly on a closed pipe, and with one line on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would flush standard output again at exit and report the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            print(f"{ctx.info_name}: interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        return result


def command_group(
    name: str, help_text: str, no_arguments_is_help: bool = False, add_completion: bool = False
) -> typer.Typer:
    """Create a program, or a subgroup of commands, with the conventions of this project."""
    return Program(
        name=name,
        cls=Commands,
        help=help_text,
        epilog=EXIT_CODES,
        no_args_is_help=no_arguments_is_help,
        add_completion=add_completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=CONTEXT_SETTINGS,
    )


def program(name: str, help_text: str, commands: Mapping[str, Sequence[ModuleType]]) -> typer.Typer:
    """Assemble a program from the modules of its commands.

    Args:
        name: name of the program.
        help_text: description of the program.
        commands: modules by heading in the help. A module is named after its command and has either a function of that
            name or, for a group of commands, an `application`.
    """
    application = command_group(name, help_text, add_completion=True)

    @application.callback(invoke_without_command=True, help=help_text)
    def start(
        context: typer.Context,
        show_version: Annotated[bool, version_option(name)] = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        set_verbosity(quiet, verbose)
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
    _add_help(application, name)
    return application


def _add_help(application: typer.Typer, program_name: str) -> None:
    """Add the command `help`."""

    @application.command("help", epilog=EXIT_CODES, rich_help_panel="Help")
    def show_help(
        context: typer.Context,
        topic: Annotated[
            list[str] | None,
            typer.Argument(metavar="[TOPIC|COMMAND]", help="Topic or command; without it, list the topics."),
        ] = None,
    ) -> None:
        """Explain a topic or a command.

        **Examples**

        `genomamba help`

        `genomamba help formats`
        """
        words = topic or []
        if not words:
            for name, (title, _) in TOPICS.items():
                print(f"{name:<12}  {title}")
            print(f"{'COMMAND':<12}  as {program_name} COMMAND --help")
        elif words[0] in TOPICS:
            print(textwrap.dedent(TOPICS[words[0]][1]).strip("\n"))
        else:
            _print_command_help(context, words)


def _print_command_help(context: typer.Context, words: Sequence[str]) -> None:
    """Print the help of a command, given as words."""
    found: Any = context.parent
    assert found is not None
    for word in words:
        command = getattr(found.command, "commands", {}).get(word)
        if command is None:
            from mambapipelines.cli.options import input_error  # noqa: PLC0415

            raise input_error(
                f"there is no topic or command '{' '.join(words)}': the topics are {', '.join(TOPICS)}, and "
                f"`{context.find_root().info_name} --help` lists the commands."
            )
        found = type(found)(command, info_name=word, parent=found)
    print(found.get_help())


def backend_lines() -> list[str]:
    """Return PyTorch's version and the state of each backend."""
    import torch  # noqa: PLC0415

    from mambacore import backends  # noqa: PLC0415

    try:
        states = [f"backend {name}: {state}" for name, state in backends().items()]
    except ImportError as error:
        states = [f"backend native: broken, {error}"]
    return [f"torch {torch.__version__}", *states]


def version_option(program_name: str) -> Any:
    """Return the option `--version` of a program."""

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
    """Prints warnings of the packages on standard error, as redirected at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one warning."""
        from mambacore.safe_text import safe_for_terminal, shortened  # noqa: PLC0415

        print(safe_for_terminal(shortened(record.getMessage())), file=sys.stderr, flush=True)


def show_warnings() -> None:
    """Show warnings of the packages on standard error."""
    for name in ("mambacore", "genomamba", "audiomamba"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, Notes) for handler in logger.handlers):
            logger.addHandler(Notes())


def replace_closed_streams() -> None:
    """Replace standard streams that are closed, which Python has as `None`.

    Input is then empty, messages go nowhere, and writing to standard output is an error, so that no result is lost
    without a word.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        # Not for writing: whoever writes is told.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")


def run_program(application: Callable[..., Any], program_name: str, arguments: Sequence[str] | None) -> int:
    """Run a command line and return the exit code.

    Args:
        application: the program's commands.
        program_name: prefix of its messages.
        arguments: arguments without the program name; `None` uses those of the process.
    """
    replace_closed_streams()
    show_warnings()
    verbosity, started = os.environ.get(VERBOSITY_VARIABLE), time.monotonic()
    try:
        with signals_raise():
            application(args=None if arguments is None else list(arguments), prog_name=program_name)
    except ValueError as error:
        from mambacore.errors import InputError  # noqa: PLC0415

        if not isinstance(error, InputError):
            raise
        _print_error(program_name, error)
        return EXIT_INPUT_ERROR
    except (MemoryError, RuntimeError) as error:
        sentence = _memory_sentence(error)
        if sentence is None:
            raise
        _print_error(program_name, RuntimeError(sentence))
        return EXIT_INPUT_ERROR
    except OSError as error:
        # A full disk or a revoked permission that no reader or writer expected is still not a mistake of the program.
        if error.errno is None:
            raise
        if error.errno == errno.EBADF:
            # A closed standard output would be flushed again at exit.
            sys.stdout = None  # type: ignore[assignment]
            error = OSError(error.errno, "standard output is closed: redirect it, or name a file with --output")
        from mambacore.safe_text import safe_for_terminal, shortened  # noqa: PLC0415

        place = f" ({error.filename})" if error.filename is not None else ""
        print(safe_for_terminal(shortened(f"{program_name}: error: {error.strerror}{place}")), file=sys.stderr)
        return EXIT_INPUT_ERROR
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    finally:
        if is_verbose():
            _print_summary(program_name, time.monotonic() - started)
        if verbosity is None:
            os.environ.pop(VERBOSITY_VARIABLE, None)
        else:
            os.environ[VERBOSITY_VARIABLE] = verbosity
    return 0


def _memory_sentence(error: Exception) -> str | None:
    """What to say of memory that the machine does not have; `None` for other errors."""
    # PyTorch's, which is not imported for its name; on a CPU it has no class of its own.
    if type(error).__name__ == "OutOfMemoryError":
        return "the memory of the device is too small for this: use --device cpu."
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "the memory of this machine is too small for this: use smaller sizes, lengths or batches."
    return None


def _print_error(program_name: str, error: Exception) -> None:
    """Print one line on standard error; with `--verbose`, another for the cause and the place that raised it."""
    from mambacore.safe_text import safe_for_terminal  # noqa: PLC0415

    sentence = " ".join(str(error).split())
    print(f"{program_name}: error: {safe_for_terminal(sentence)}", file=sys.stderr)
    if not is_verbose():
        return
    cause: BaseException | None = error
    while cause is not None:
        place, words = cause.__traceback__, " ".join(str(cause).split())
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "unknown place"
        print(safe_for_terminal(f"{program_name}: raised at {where}: {type(cause).__name__}: {words}"), file=sys.stderr)
        cause = cause.__cause__


def _print_summary(program_name: str, seconds: float) -> None:
    """Print the summary of `--verbose`: the backends, if used, wall time and peak memory."""
    import resource  # noqa: PLC0415

    if "torch" in sys.modules:
        for line in backend_lines():
            print(f"{program_name}: {line}", file=sys.stderr)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"{program_name}: {seconds:.1f} s, at most {largest:.2f} GiB of memory", file=sys.stderr)
