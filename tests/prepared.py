"""New Python processes without the seconds in which torch and transformers are imported: forks of one that has imported them.

    with prepared():
        subprocess.run([sys.executable, "-m", "lorank", ...])       a child as ever: pid, signals, pipes, exit code

A server imports everything once and waits. For each start it forks a process that forks the child and ends, so that the child becomes
one of whoever asked, who has declared itself the next of kin of orphans (Linux: PR_SET_CHILD_SUBREAPER). The child can start others
in the same way. What a fork cannot give starts as usual: other variables that libraries read, other programs, another lorank.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
IMPORTED = ("lorank.cli", "lorank.train.run", "lorank.comparison.runner", "transformers.models.llama.modeling_llama")
PR_SET_CHILD_SUBREAPER = 36
FREE = {
    "PYTHONPATH",
    "COLUMNS",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTEST_CURRENT_TEST",
}
"""Variables that may differ from the server's: no library reads them when it is imported."""


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Inside, Python processes that are started are forks, where that makes no difference but to time."""
    if sys.platform != "linux":
        yield
        return
    with mock.patch("subprocess._fork_exec", functools.partial(_start, subprocess._fork_exec, _server())):  # type: ignore[attr-defined]
        yield


@functools.cache
def _server() -> socket.socket:
    """Of this process."""
    ours, theirs = socket.socketpair()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = f"from tests.prepared import serve; serve({theirs.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _start(usual: Callable[..., int], server: socket.socket, *given: Any) -> int:
    """Instead of `_posixsubprocess.fork_exec`: the child's number."""
    command, executables, _, kept, folder, variables, p2c, _, _, c2p, _, err, _, failed, _, session = given[:16]
    words = [os.fsdecode(word) for word in command]
    env = dict(os.environ) if variables is None else dict(os.fsdecode(line).split("=", 1) for line in variables)
    forks = executables == (os.fsencode(sys.executable),) and kept == (failed,) and _says_what_to_run(words)
    if not (forks and _alike(env)):
        return usual(*given)
    streams = [own if fd == -1 else fd for own, fd in enumerate((p2c, c2p, err))]
    asked = {"words": words[1:], "env": env, "folder": os.fsdecode(folder or os.getcwd()), "session": bool(session)}
    asked["deaf"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as what a shell runs behind the terminal
    message = json.dumps(asked).encode()
    socket.send_fds(server, [len(message).to_bytes(4, "big")], streams)
    server.sendall(message)
    return int.from_bytes(server.recv(4), "big")


def _says_what_to_run(words: list[str]) -> bool:
    rest = words[3:] if words[1:3] == ["-W", "ignore"] else words[1:]
    return bool(rest) and (rest[0] in ("-c", "-m") or rest[0].endswith(".py"))


def _alike(env: Mapping[str, str]) -> bool:
    """Whether no library would be loaded differently, and lorank is this one."""
    if any(env.get(name) != os.environ.get(name) for name in {*env, *os.environ} - FREE):
        return False
    paths = [Path(path) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    return all(path == ROOT or not (path / "lorank").exists() for path in paths)


def serve(fd: int) -> None:
    """Import everything, then fork a child for each start that is asked for, until nobody can ask any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _answer(socket.socket(fileno=fd))


def _answer(asker: socket.socket) -> None:
    while True:
        head, streams, _, _ = socket.recv_fds(asker, 4, 3)
        if not head:
            os._exit(0)
        asked = json.loads(asker.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        told, tells = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for own in (asker.fileno(), told, tells):
                    os.close(own)
                os._exit(_run(asked, streams))
            os.write(tells, child.to_bytes(4, "big"))
            os._exit(0)
        os.waitpid(between, 0)  # from now on the child is the asker's
        asker.sendall(os.read(told, 4))
        os.close(told)
        os.close(tells)
        for stream in streams:
            os.close(stream)


def _run(asked: dict[str, Any], streams: list[int]) -> int:
    """In the child: the program, and its exit code."""
    if asked["session"]:
        os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    for stream in streams:
        os.close(stream)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN if asked["deaf"] else signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    words = asked["words"]
    if words[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        words = words[2:]
    sys.path[:0] = [path for path in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    code = 1
    try:
        with _forks_too():
            _program(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code == -signal.SIGINT:  # as Python itself ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _program(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
        runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def _forks_too() -> Iterator[None]:
    """This process starts others as it was started: a fork of it, before it does anything else, is their server."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        _answer(theirs)
    theirs.close()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with mock.patch("subprocess._fork_exec", functools.partial(_start, subprocess._fork_exec, ours)):  # type: ignore[attr-defined]
        yield
