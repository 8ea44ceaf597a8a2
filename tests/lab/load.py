"""An application that writes on a node for as long as a cell needs it."""

from __future__ import annotations

import threading

from .nodes import Node, wait
from .pair import Pair
from .uml import CommandFailed

FOR_EVER_S = 60  # of the application's own clock, should nobody end it


class Load:
    """Random writes with flushes on *node*, from now on. They end with the node, or after *seconds*."""

    def __init__(self, node: Node, size: str = "40m", seconds: int = FOR_EVER_S) -> None:
        self.node = node
        self.size = size
        self.seconds = seconds
        self.error = ""  # what the application complained of: an I/O error, or that its node died
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.node.fio(
                "--name=load", "--rw=randwrite", "--bsrange=4k-64k", f"--size={self.size}", "--io_size=10g",
                "--iodepth=8", "--fsync=20", "--time_based", f"--runtime={self.seconds}",
            )  # fmt: skip
        except (CommandFailed, OSError) as error:
            self.error = str(error) or repr(error)

    def end(self) -> str:
        """Wait until it has ended; its complaint, empty if there is none."""
        self.thread.join(FOR_EVER_S + 120)
        assert not self.thread.is_alive()
        return self.error


def busy(node: Node, pair: Pair) -> None:
    """Wait until the load has left traces on the peer's disk."""
    path = pair.other(node).disk_file()
    before = path.stat().st_mtime_ns
    wait(node, lambda _: path.stat().st_mtime_ns != before, "writing")
