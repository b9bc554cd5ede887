"""What the user reads when something goes wrong: one sentence on stderr, and an exit code."""

import errno
import io
import os
import re
import sys

import click

from lorank.cli.flags import Assignments
from lorank.panics import is_panic

MOVED = {
    ("plan", "--paper"): "lorank papers NAME",
    **{
        (name, "--recipe"): f"its name without a flag, as in: lorank {name} cola-60m"
        for name in ("pretrain", "plan", "compare")
    },
}
"""What to write instead of flags of earlier versions, and of others that people look for, by command and flag."""


def run(command: click.Command) -> None:
    """Run the command line. Bad input and failing disks exit with 2, Ctrl-C with 130, anything unexpected with 1; none
    prints a traceback unless LORANK_TRACEBACK is set."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 loses a sign, not the result
    try:
        command(standalone_mode=False)
    except click.NoSuchOption as error:
        _exit(2, _no_such_option(error))
    except click.ClickException as error:
        _exit(2, _with_help(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("LORANK_TRACEBACK"):
            raise
        _exit(2, sentence(error))
    except Exception as error:
        if os.environ.get("LORANK_TRACEBACK"):
            raise
        hint = "LORANK_TRACEBACK=1 shows where; please report it"
        _exit(1, f"unexpected {type(error).__name__}: {sentence(error)} ({hint})")
    except BaseException as error:
        if not is_panic(error) or os.environ.get("LORANK_TRACEBACK"):
            raise
        _exit(2, f"a library failed at what it was given ({sentence(error)}); use another tokenizer, model or text")


def _exit(code: int, message: str) -> None:
    click.echo(f"lorank: {message}", err=True)
    sys.exit(code)


def _with_help(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return error.format_message().rstrip(".") + (f"; see {context.command_path} --help" if context else "")


def _no_such_option(error: click.NoSuchOption) -> str:
    """With the way to say it now, if the option is a setting of a recipe or belonged to an earlier version."""
    if error.ctx is None:
        return _with_help(error)
    command = error.ctx.command
    instead = MOVED.get((command.name or "", error.option_name))
    for assignments in (option for option in command.params if isinstance(option, Assignments)):
        instead = instead or assignments.instead_of(error.option_name)
    if not instead:
        nearest = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ";"
        instead = f"see {error.ctx.command_path} --help"
        return f"no such option: {error.option_name}{nearest} {instead}"
    return f"no such option: {error.option_name}; use {instead}"


def sentence(error: BaseException) -> str:
    """What an error says, on one line. The error of a full disk names no file, so this says where to look."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return (
            "the disk is full; free some space where --out, the cache (XDG_CACHE_HOME) or temporary files (TMPDIR) are"
        )
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) < 1000 else f"{text[:1000]} ..."
