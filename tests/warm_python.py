"""A python that has imported torch, transformers and megatron-core before: a program begins at once, in a fork of a process that waits.

Tests that start many programs, a recipe's thirty stages above all, spend most of their time importing the same libraries. A program has its
own arguments, environment, folder, streams, and megakd's modules, which the waiting process does not hold; what it starts by sys.executable
begins as quickly. It is killed with whoever asked for it. Not its own are what libraries read of the environment as they are imported, and
signals: tests of stopping start python itself.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

LIBRARIES = (  # and what they import as they are used
    "torch", "torch._dynamo", "torch.distributed.launcher.api", "torch.utils.tensorboard", "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "tyro",
    "rouge_score.rouge_scorer", "matplotlib.backends.backend_agg", "matplotlib.figure",
)  # fmt: skip
PR_SET_PDEATHSIG = 1  # prctl.h
CLIENT = """#!{python} -IS
import array, ctypes, json, os, socket, sys
ctypes.CDLL(None).prctl({pdeathsig}, 9)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect({address!r})
asked = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
server.sendmsg([len(asked).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(asked)
os._exit(int(server.recv(16) or b"1"))
"""


def start(folder: Path) -> tuple[Path, subprocess.Popen]:
    """The command that takes python's place, and the process behind it, which ends when its standard input does."""
    address, command = folder / "socket", folder / "python"
    command.write_text(CLIENT.format(python=sys.executable, pdeathsig=PR_SET_PDEATHSIG, address=str(address)))
    command.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert b"ready\n" in iter(server.stdout.readline, b""), "it ended before it was ready"
    return command, server


def serve(address: str) -> None:
    """Fork for whoever asks, until nobody holds the other end of the standard input."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # nobody collects them, page by page
    sys.path.remove(str(Path(__file__).parent))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                os._exit(_answer(client))
            client.close()
    os._exit(0)


def _answer(client: socket.socket) -> int:
    """Run the program in a child and tell the client how it ended."""
    size, descriptors, *_ = client.recvmsg(4, socket.CMSG_LEN(3 * array.array("i").itemsize))
    length, asked = int.from_bytes(size, "little"), b""
    while len(asked) < length and (part := client.recv(length - len(asked))):
        asked += part
    if not asked or len(asked) < length:  # whoever asked is gone
        return 1
    streams = array.array("i", descriptors[0][2])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        client.close()
        os.setpgid(0, 0)  # so that what it forks is killed with it
        os._exit(_run(*json.loads(asked), streams))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends whoever asked, and so the program
    if client in select.select([client, os.pidfd_open(child)], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
        return 1
    client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255).encode())
    return 0


def _run(words: list[str], environment: dict[str, str], folder: str, streams) -> int:
    """As python would have, with the exit code. words: the command in python's place, and what it was given."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number), os.close(stream)
    os.chdir(folder)
    os.environ.clear(), os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(":") if part]
    sys.executable, *words = words
    try:
        _program(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        threading._shutdown(), atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
    return 0


def _program(words: list[str]) -> None:
    """A file, `-m NAME` or `-c TEXT`; `-u` in front of it means nothing here."""
    words = words[words[0] == "-u" :]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, "")
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
