"""A service that keeps what it is told on a file system, and says so only when it is on stable storage.

Runs in the guest that has the file system mounted: `store.py ADDRESS PORT DIRECTORY PID-FILE`. Two ways of
writing, as programs do it: a *file* is written beside its place, synced, renamed into place, and its directory
synced; a *record* of 512 bytes is overwritten in the middle of a table and synced. A request is one JSON line,
for a write followed by the data; the answer is one JSON line. `list` tells what is there: for each file and
record its first line, which says what it is, and the checksum of it all.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
from typing import IO, Any, cast

RECORD = 512


def put_file(root: str, name: str, data: bytes) -> None:
    place = os.path.join(root, "files", name)
    beside = f"{place}.{threading.get_ident()}.new"
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, place)
    directory = os.open(os.path.dirname(place), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def put_record(root: str, table: str, slot: int, data: bytes) -> None:
    fd = os.open(os.path.join(root, "tables", table), os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, data, slot * RECORD)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def described(data: bytes) -> list[str]:
    return [data.partition(b"\n")[0].decode("latin-1"), hashlib.sha256(data).hexdigest()]


def contents(root: str) -> dict[str, list[str]]:
    found = {}
    for name in os.listdir(os.path.join(root, "files")):
        if name.endswith(".new"):
            continue  # on its way, or left by a crash: never acknowledged
        with open(os.path.join(root, "files", name), "rb") as file:
            found[f"file/{name}"] = described(file.read())
    for name in os.listdir(os.path.join(root, "tables")):
        with open(os.path.join(root, "tables", name), "rb") as file:
            data = file.read()
        for at in range(0, len(data), RECORD):
            if data[at : at + RECORD].strip(b"\0"):
                found[f"{name}/{at // RECORD}"] = described(data[at : at + RECORD])
    return found


def answer(root: str, request: dict[str, Any], stream: IO[bytes]) -> dict[str, Any]:
    if request["do"] == "list":
        return {"found": contents(root)}
    data = stream.read(request["length"])
    if len(data) < request["length"]:
        raise ConnectionError
    if request["do"] == "file":
        put_file(root, request["name"], data)
    else:
        put_record(root, request["table"], request["slot"], data)
    return {}


def serve(root: str, sock: socket.socket) -> None:
    with sock, cast("IO[bytes]", sock.makefile("rwb")) as stream:
        try:
            for line in stream:
                try:
                    reply = answer(root, json.loads(line), stream)
                except ConnectionError:
                    return
                except OSError as error:
                    reply = {"error": str(error)}
                stream.write(json.dumps(reply).encode() + b"\n")
                stream.flush()
        except OSError:
            return  # whoever asked is gone


def main() -> None:
    address, port, root, pid_file = sys.argv[1:]
    for directory in ("files", "tables"):
        os.makedirs(os.path.join(root, directory), exist_ok=True)
    listener = socket.create_server((address, int(port)), backlog=16)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(root, sock), daemon=True).start()


main()
