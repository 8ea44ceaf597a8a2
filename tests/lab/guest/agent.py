"""Runs commands inside a guest for the test outside: one TCP connection, one JSON line each way.

The request is {"argv", "stdin"} for a command, {"read"} for a file (a process start is slow in a guest),
{"unix", "send"} for a line to whoever listens on a Unix socket, answered with the line that comes back, or
{"spawn"} for a command that goes on after the answer. Bytes travel as Latin-1 text. When the caller
hangs up, the command's process group is killed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

PORT = 7001


def answer(request: dict[str, Any], sock: socket.socket) -> dict[str, Any]:
    if "read" in request:
        with open(request["read"], "rb") as file:
            return {"rc": 0, "out": file.read().decode("latin-1"), "err": ""}
    if "unix" in request:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(request["unix"])
            other.sendall(request["send"].encode("latin-1") + b"\n")
            return {"rc": 0, "out": other.makefile("rb").readline().decode("latin-1"), "err": ""}
    if "spawn" in request:
        with open(request["log"], "ab") as log:
            process = subprocess.Popen(
                request["spawn"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        threading.Thread(target=process.wait, daemon=True).start()
        return {"rc": 0, "out": str(process.pid), "err": ""}
    process = subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def watch() -> None:
        try:
            if not sock.recv(1) and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            pass

    threading.Thread(target=watch, daemon=True).start()
    out, err = process.communicate(request.get("stdin", "").encode("latin-1"))
    return {"rc": process.returncode, "out": out.decode("latin-1"), "err": err.decode("latin-1")}


def serve(sock: socket.socket) -> None:
    with sock:
        line = sock.makefile("rb").readline()
        if not line:
            return
        try:
            reply = answer(json.loads(line), sock)
        except OSError as error:
            reply = {"rc": 127, "out": "", "err": str(error)}
        try:
            sock.sendall(json.dumps(reply).encode() + b"\n")
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def main() -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((sys.argv[1], PORT))
    listener.listen(16)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


main()
