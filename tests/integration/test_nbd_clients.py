"""nbd/server with the clients people use: libnbd, qemu, fio, nbd-client."""

from __future__ import annotations

import filecmp
import json
import random
import subprocess
import textwrap
from pathlib import Path

import pytest
from tandem.repl.requests import Op

from tests.nbd_serving import KIB, MIB, PATIENCE_S, SIZE, Serving, run
from tests.nbd_volume import RamVolume


def libnbd(serving: Serving, script: str) -> str:
    """Run *script* with ``h``, an unconnected libnbd handle, and ``uri``, in the system's Python."""
    start = f"import nbd, os, random\nuri = {serving.uri!r}\nh = nbd.NBD()\n"
    return run("/usr/bin/python3", "-c", start + textwrap.dedent(script), cwd=Path(serving.path).parent)


# ------------------------------------------------------------------------------------ libnbd


def test_nbdinfo(serving: Serving) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", serving.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["description"] == "Primary, UpToDate"
    assert export["contexts"] == ["base:allocation"]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [512, 4096, 32 * MIB]
    can = {key for key, value in export.items() if value is True}
    assert can == {"can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim",
                   "can_zero"}  # fmt: skip


def test_lists_of_exports(tmp_path: Path) -> None:
    first, second = RamVolume(SIZE, "r0/0"), RamVolume(2 * SIZE, "r0/1", number=1)
    second.description = "Primary, Inconsistent"
    with Serving(tmp_path, first, second) as serving:
        listed = json.loads(run("nbdinfo", "--list", "--json", serving.uri))["exports"]
        assert [(e["export-name"], e["export-size"], e["description"]) for e in listed] == [
            ("r0/0", SIZE, "Primary, UpToDate"), ("r0/1", 2 * SIZE, "Primary, Inconsistent"),
        ]  # fmt: skip
        names = run("nbd-client", "-l", "-u", serving.path)
        assert "r0/0" in names and "r0/1" in names
        assert run("nbdinfo", "--size", serving.uri.replace("///", "///r0/1")).strip() == str(2 * SIZE)
        assert run("nbdinfo", "--size", serving.uri).strip() == str(SIZE), "the first is the default"


def test_libnbd_haggling_out_of_order(serving: Serving) -> None:
    """Each option twice, in odd orders, with refusals between."""
    out = libnbd(serving, """
        h.set_opt_mode(True)
        h.connect_uri(uri)
        assert h.get_protocol() == "newstyle-fixed"
        names = []
        for _ in range(2):
            h.opt_list(lambda name, text: names.append(name))
        assert names == ["r0", "r0"], names
        def refused(call):
            try:
                call()
            except nbd.Error as error:
                return error.string
            raise AssertionError("was not refused")
        h.set_debug(True)
        h.set_debug_callback(lambda context, text: print(text))
        h.set_export_name("nope")
        for _ in range(2):
            refused(h.opt_info)
        refused(h.opt_go)
        h.set_export_name("r0")
        contexts = []
        for _ in range(2):
            h.opt_list_meta_context(lambda name: contexts.append(name))
            h.opt_info()
        assert contexts == ["base:allocation"] * 2, contexts
        h.add_meta_context("x-unknown:thing")
        h.add_meta_context("base:allocation")
        h.opt_go()
        assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-unknown:thing")
        h.pread(512, 0)
        h.shutdown()
        a = nbd.NBD()
        a.set_opt_mode(True)
        a.connect_uri(uri)
        a.opt_abort()
    """)  # fmt: skip
    assert "There is no export 'nope' here; there is: r0." in out


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_commands(serving: Serving, volume: RamVolume, structured: bool) -> None:
    libnbd(serving, f"""
        structured = {structured}
        h.set_request_structured_replies(structured)
        h.add_meta_context("base:allocation")
        h.connect_uri(uri)
        data = random.Random(1).randbytes(256 << 10)
        h.pwrite(data, 0)
        h.pwrite(data[:4096], 1 << 20, nbd.CMD_FLAG_FUA)
        assert h.pread(256 << 10, 0) == data
        h.flush()
        h.zero(64 << 10, 0)
        h.zero(64 << 10, 64 << 10, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        h.trim(64 << 10, 128 << 10)
        assert h.pread(256 << 10, 0) == bytes(192 << 10) + data[192 << 10:]
        if structured:
            df = h.pread_structured(64 << 10, 0, lambda *chunk: None, nbd.CMD_FLAG_DF)
            assert df == bytes(64 << 10)
            seen = []
            h.block_status(256 << 10, 0, lambda c, o, e, err: seen.append(list(e)))
            assert seen == [[65536, 3, 65536, 0, 65536, 3, 65536, 0]], seen
        h.set_strict_mode(0)
        def error(call, *args):
            try:
                call(*args)
            except nbd.Error as e:
                return e.errno
        size = h.get_size()
        assert error(h.pread, 512, size) == "EINVAL"
        assert error(h.pwrite, bytes(512), size) == "ENOSPC"
        assert error(h.zero, 512, size) == "ENOSPC"
        assert error(h.trim, 512, size) == "EINVAL"
        assert error(h.pread, 512, 1) == "EINVAL"
        assert error(h.cache, 512, 0) == "EINVAL"
        assert error(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO) == "ENOTSUP"
        h.pwrite(bytes(32 << 20), 0)
        assert h.pread(32 << 20, 0) == bytes(32 << 20)
        h.zero(size, 0)
        h.shutdown()
    """)  # fmt: skip
    serving.all_gone()
    assert volume.n_open == 0


def test_libnbd_many_in_flight_on_several_connections(serving: Serving) -> None:
    """Up to 64 requests in flight on each of 4 connections, pieces of any size, all of it read back."""
    libnbd(serving, """
        draw = random.Random(3)
        handles = []
        for n in range(4):
            g = nbd.NBD()
            g.connect_uri(uri)
            assert g.can_multi_conn()
            handles.append(g)
        data = draw.randbytes(16 << 20)
        def drain(g, limit):
            while g.aio_in_flight() > limit:
                g.poll(-1)
        at = 0
        while at < len(data):
            length = min(draw.choice((512, 4096, 65536, 3 << 19)), len(data) - at)
            g = draw.choice(handles)
            g.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[at:at + length])), at,
                         lambda error: 1 if not error.value else 0)
            drain(g, 63)
            at += length
        for g in handles:
            drain(g, 0)
        handles[0].flush()
        at, parts = 0, []
        while at < len(data):
            length = min(draw.choice((512, 4096, 65536, 3 << 19)), len(data) - at)
            buffer = nbd.Buffer(length)
            g = draw.choice(handles)
            g.aio_pread(buffer, at, lambda error: 1 if not error.value else 0)
            parts.append(buffer)
            drain(g, 63)
            at += length
        for g in handles:
            drain(g, 0)
            g.shutdown()
        assert b"".join(bytes(p.to_bytearray()) for p in parts) == data
    """)  # fmt: skip


def test_the_sentence_of_a_refusal_reaches_the_client(serving: Serving, volume: RamVolume) -> None:
    volume.refusal = "r0 is Secondary on bob: promote it with 'tandemadm primary r0'."
    url = f"nbd+unix:///r0?socket={serving.path}"
    for command in (["qemu-img", "info", url], ["nbdinfo", serving.uri]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert command[0] == "nbdinfo" or volume.refusal in done.stderr
    volume.refusal = None
    assert run("nbdinfo", "--size", serving.uri).strip() == str(SIZE)


# ------------------------------------------------------------------------------------ copies


def sparse_file(path: Path) -> None:
    draw = random.Random(4)
    with path.open("wb") as out:
        out.truncate(SIZE)
        for _ in range(20):
            out.seek(draw.randrange(SIZE // 4096 - 300) * 4096)
            out.write(draw.randbytes(draw.choice((4096, 100 * KIB, MIB))))


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copies_in_and_out(tmp_path: Path, serving: Serving, volume: RamVolume, tool: str) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    sparse_file(source)
    volume.image[:] = b"\xaa" * SIZE
    volume.holes[:] = bytes(len(volume.holes))
    if tool == "nbdcopy":
        run("nbdcopy", "--flush", str(source), serving.uri)
        run("nbdcopy", serving.uri, str(back))
    else:
        url = f"nbd+unix:///r0?socket={serving.path}"
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), url)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(back))
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), url)
    assert filecmp.cmp(source, back, shallow=False)
    assert volume.image == source.read_bytes()
    assert back.stat().st_blocks * 512 < SIZE // 2, "block status told where the holes are"


def test_qemu_io(serving: Serving, volume: RamVolume) -> None:
    url = f"nbd+unix:///r0?socket={serving.path}"
    commands = ["write -P 0x11 0 4M", "write -f -P 0x22 1M 64k", "write -z 2M 64k", "write -z -u 3M 64k",
                "discard 3584k 512k", "flush", "read -P 0x11 0 1M", "read -P 0x22 1M 64k", "read -P 0 2M 64k",
                "read -P 0 3M 64k", "aio_write -P 0x33 8M 2M", "aio_read -P 0x11 512k 512k", "aio_flush",
                "read -P 0x33 8M 2M"]  # fmt: skip
    script = [argument for command in commands for argument in ("-c", command)]
    out = run("qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", *script, url)
    assert "failed" not in out
    assert Op.TRIM in {seen[0] for seen in volume.seen}
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", url))
    assert sum(part["length"] for part in mapped) == SIZE
    assert mapped[0]["data"] is True


def test_fio_verifies_what_it_wrote(tmp_path: Path, serving: Serving) -> None:
    run("fio", "--name=verify", "--ioengine=nbd", f"--uri={serving.uri}", "--rw=randrw", "--bsrange=512-3M",
        "--bs_unaligned=0", "--blockalign=512", "--iodepth=16", "--size=32M", "--verify=crc32c",
        "--verify_fatal=1", "--randseed=7", "--fsync=32", cwd=tmp_path)  # fmt: skip
