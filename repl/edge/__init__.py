"""The edges: the only code in `repl` that touches disks, sockets, processes, time and entropy."""
