"""Mixes for bugs that random ones meet only now and then: each draws the runs closer to where one can show."""

from __future__ import annotations

from dataclasses import replace

from tandem.repl.config import AfterSb, Fencing

from tests.sim.mix import LARGE, MIB, Mix
from tests.sim.mix import long_writes as mix_of_long_writes


def many_extents_and_crashes(mix: Mix) -> Mix:
    """More extents than the log holds, written mostly alone, and crashes."""
    return replace(
        mix, size=LARGE, n_spots=90, n_volumes=1, fresh=False, steps=700, client=15, queue_depth=16, flushes=0,
        cut=0.1, reconnect=0.02, process_crash=0.02, power_cut=0.02, reboot=4, al_updates=True, eio=0.0,
        fencing=Fencing.DONT_CARE, protocol="C", big_writes=False, admin=0,
    )  # fmt: skip


def failing_disks(mix: Mix) -> Mix:
    """Disks that fail single writes, of a connected pair."""
    return replace(mix, eio=0.08, on_io_error="pass_on", cut=0, process_crash=0, power_cut=0, admin=0, client=15)


def failing_flushes(mix: Mix) -> Mix:
    """Disks that fail, mostly flushes, and links that are lost and come back."""
    return replace(
        mix, eio=0.08, on_io_error="pass_on", cut=0.1, reconnect=4, process_crash=0, power_cut=0, client=15, flushes=5,
        fresh=False, protocol="C", size=2 * MIB, fencing=Fencing.DONT_CARE, two_primaries=False,
    )  # fmt: skip


def power_cuts(mix: Mix) -> Mix:
    """Power fails on small devices that are written much."""
    return replace(mix, power_cut=0.1, reboot=4, eio=0.0, client=15, size=2 * MIB, fresh=False)


def power_cuts_behind_short_epochs(mix: Mix) -> Mix:
    """A peer without power loses writes of which the log has only the blocks left."""
    return replace(power_cuts(mix), max_epoch_size=1, n_spots=12, flushes=0.1, protocol="C")


def process_crashes(mix: Mix) -> Mix:
    """Primaries that crash with writes in flight and come back to a connected peer."""
    return replace(mix, process_crash=0.15, power_cut=0, reboot=4, reconnect=4, eio=0.0, cut=0, client=15, admin=0)


def lost_links_under_stonith(mix: Mix) -> Mix:
    return replace(mix, fencing=Fencing.RESOURCE_AND_STONITH, protocol="C", cut=0.3, client=15, eio=0.0)


def many_cuts(mix: Mix) -> Mix:
    """Short connections, so that most resyncs are interrupted."""
    return replace(mix, cut=0.3, reconnect=4, chunk=True, early=True, eio=0.0, n_spots=12)


def leaves_often(mix: Mix) -> Mix:
    """Secondaries that disconnect from a Primary."""
    return replace(
        mix, fencing=Fencing.RESOURCE_AND_STONITH, protocol="C", admin=4, client=15, size=2 * MIB, n_volumes=1,
        two_primaries=False, fresh=False,
    )  # fmt: skip


def ends_sessions(mix: Mix) -> Mix:
    """Operators who demote by force."""
    return replace(mix, admin=4, client=15, queue_depth=16)


def careful_without_fencing(mix: Mix) -> Mix:
    """No split brain may come about, whatever the disks and the operator do."""
    return replace(
        mix, fencing=Fencing.DONT_CARE, risky=False, two_primaries=False, cut=0.1, eio=0.03, admin=1, fresh=False,
        on_io_error="detach", after_sb=(AfterSb.DISCONNECT,) * 3,
    )  # fmt: skip


def fua_at_once(mix: Mix) -> Mix:
    """Two Primaries, one place, many FUA writes and power cuts."""
    return replace(two_write_at_once(mix), flushes=10, power_cut=0.1, reboot=4, queue_depth=16)


def fences_often(mix: Mix) -> Mix:
    return replace(
        mix, fencing=Fencing.RESOURCE_AND_STONITH, protocol="C", cut=0.3, reconnect=4, slow_handler=True,
        lying_handler=True, client=15, size=2 * MIB, n_volumes=1, two_primaries=False,
    )  # fmt: skip


def loses_links_unfrozen(mix: Mix) -> Mix:
    return replace(
        mix, fencing=Fencing.RESOURCE_ONLY, protocol="C", cut=0.3, client=15, size=2 * MIB, two_primaries=False
    )


def splits_brains(mix: Mix) -> Mix:
    return replace(
        mix, fencing=Fencing.DONT_CARE, risky=True, cut=0.3, process_crash=0.15, client=15, size=2 * MIB,
        after_sb=(AfterSb.DISCONNECT,) * 3, two_primaries=False,
    )  # fmt: skip


def two_write_at_once(mix: Mix) -> Mix:
    return replace(
        mix, two_primaries=True, fencing=Fencing.DONT_CARE, protocol="C", n_spots=1, client=15, size=2 * MIB,
        cut=0, process_crash=0, power_cut=0, eio=0, half_dead=0,
    )  # fmt: skip


def long_writes(mix: Mix) -> Mix:
    """Hardly anything but long writes to a connected peer, and links, processes and disks that fail meanwhile."""
    return replace(
        mix_of_long_writes(mix), steps=360, size=2 * MIB, n_volumes=1, n_spots=12, flushes=1, fencing=Fencing.DONT_CARE,
        cut=0.1, process_crash=0.02, power_cut=0.02, eio=0.015, reboot=4, admin=0, tick=0.1, chunk=True, early=True,
    )  # fmt: skip


def long_writes_and_cuts(mix: Mix) -> Mix:
    return replace(long_writes(mix), cut=0.5, process_crash=0, power_cut=0, eio=0)


def long_writes_and_resyncs(mix: Mix) -> Mix:
    return replace(long_writes(mix), cut=0.2, process_crash=0, power_cut=0.05, eio=0, n_spots=4, queue_depth=8)
