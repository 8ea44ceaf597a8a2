"""`events2` against drbdsetup 9's lines."""

from __future__ import annotations

from dataclasses import replace

from tandem.repl.events import ConnectionStatus, Helper, PeerVolumeStatus, ResourceStatus, VolumeStatus
from tandem.tools.events2 import Events

PEER_VOLUME = PeerVolumeStatus(
    number=0, replication="Established", peer_disk="UpToDate", resync_suspended="no", received=2048,
    sent=4096, out_of_sync=0, pending=0, unacked=0, done=None, sync=None,
)  # fmt: skip
PEER = ConnectionStatus(
    name="beta", node_id=1, connection="Connected", cstate="Connected", role="Secondary", congested=False,
    ap_in_flight=0, rs_in_flight=0, protocol_version=101, local="ipv4:10.0.0.1:7788",
    remote="ipv4:10.0.0.2:7788", configured=True, volumes=(PEER_VOLUME,),
)  # fmt: skip
VOLUME = VolumeStatus(
    number=0, minor=0, disk="UpToDate", client=False, open=False, size=1 << 20, read=0, written=1024,
    al_writes=1, bm_writes=0, upper_pending=0, lower_pending=0, al_suspended=False, blocked="no",
    backing_device="/dev/vg/r0", flags="",
)  # fmt: skip
STATUS = ResourceStatus(
    name="r0", node_id=0, role="Secondary", suspended="no", write_ordering="flush", may_promote=True,
    promotion_score=10102, volumes=(VOLUME,), connection=PEER,
)  # fmt: skip

LOST = replace(
    PEER,
    connection="NetworkFailure",
    cstate="NetworkFailure",
    role="Unknown",
    volumes=(replace(PEER_VOLUME, replication="Off", peer_disk="DUnknown"),),
)


def test_present_state_in_drbdsetups_order() -> None:
    assert Events().update(STATUS, "exists") == [
        "exists resource name:r0 role:Secondary suspended:no force-io-failures:no may_promote:yes "
        "promotion_score:10102",
        "exists connection name:r0 peer-node-id:1 conn-name:beta connection:Connected role:Secondary",
        "exists device name:r0 volume:0 minor:0 backing_dev:/dev/vg/r0 disk:UpToDate client:no open:no "
        "quorum:yes",
        "exists peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:Established "
        "peer-disk:UpToDate peer-client:no resync-suspended:no",
        "exists path name:r0 peer-node-id:1 conn-name:beta local:ipv4:10.0.0.1:7788 "
        "peer:ipv4:10.0.0.2:7788 established:yes",
    ]


def test_statistics_stand_where_drbdsetup_has_them() -> None:
    resource, connection, device, peer_device, _ = Events(statistics=True).update(STATUS, "exists")
    assert resource.endswith(
        "force-io-failures:no write-ordering:flush may_promote:yes promotion_score:10102"
    )
    assert connection.endswith("role:Secondary congested:no ap-in-flight:0 rs-in-flight:0")
    assert device.endswith(
        "quorum:yes size:1024 read:0 written:1 al-writes:1 bm-writes:0 upper-pending:0 lower-pending:0 "
        "al-suspended:no blocked:no"
    )
    assert peer_device.endswith("resync-suspended:no received:2 sent:4 out-of-sync:0 pending:0 unacked:0")


def test_a_change_has_its_identification_and_the_changed_keys_only() -> None:
    events = Events()
    events.update(STATUS, "exists")
    changed = replace(STATUS, role="Primary", may_promote=False, connection=LOST)
    assert events.update(changed) == [
        "change resource name:r0 role:Primary may_promote:no",
        "change connection name:r0 peer-node-id:1 conn-name:beta connection:NetworkFailure role:Unknown",
        "change peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:Off "
        "peer-disk:DUnknown",
        "change path name:r0 peer-node-id:1 conn-name:beta local:ipv4:10.0.0.1:7788 "
        "peer:ipv4:10.0.0.2:7788 established:no",
    ]
    assert events.update(changed) == []


def test_a_changed_device_prints_its_whole_set() -> None:
    events = Events()
    events.update(STATUS, "exists")
    failed = replace(STATUS, volumes=(replace(VOLUME, disk="Failed"),))
    assert events.update(failed) == [
        "change device name:r0 volume:0 minor:0 backing_dev:/dev/vg/r0 disk:Failed client:no open:no "
        "quorum:yes"
    ]


def test_counters_alone_are_printed_for_a_poll_only() -> None:
    events = Events(statistics=True)
    events.update(STATUS, "exists")
    counted = replace(STATUS, volumes=(replace(VOLUME, written=4096),))
    assert events.update(counted) == []
    assert events.update(counted, poll=True) == ["change device name:r0 volume:0 minor:0 written:4"]
    assert events.update(counted, poll=True) == []


def test_counters_without_statistics_are_never_printed() -> None:
    events = Events()
    events.update(STATUS, "exists")
    assert events.update(replace(STATUS, volumes=(replace(VOLUME, written=4096),)), poll=True) == []


def test_full_prints_every_key_on_every_line() -> None:
    events = Events(full=True)
    events.update(STATUS, "exists")
    (line,) = events.update(replace(STATUS, suspended="user"))
    assert line == (
        "change resource name:r0 role:Secondary suspended:user force-io-failures:no write-ordering:flush "
        "may_promote:yes promotion_score:10102"
    )


def test_diff_shows_old_and_new() -> None:
    events = Events(diff=True)
    events.update(STATUS, "exists")
    assert events.update(replace(STATUS, role="Primary")) == [
        "change resource name:r0 role:Secondary->Primary"
    ]


def test_resync_progress_is_a_change() -> None:
    syncing = replace(PEER_VOLUME, replication="SyncTarget", done=12.5)
    events = Events()
    events.update(replace(STATUS, connection=replace(PEER, volumes=(syncing,))), "exists")
    further = replace(STATUS, connection=replace(PEER, volumes=(replace(syncing, done=13.0),)))
    assert events.update(further) == [
        "change peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 done:13.00"
    ]


def test_a_handler_has_a_line_when_it_is_called_and_when_it_has_ended() -> None:
    """Those of a volume name it; the status is the one wait(2) gives, as in DRBD."""
    events = Events(full=True, diff=True)
    assert [events.helper(STATUS, Helper(*helper)) for helper in (
        ("before-resync-source", 0), ("before-resync-source", 0, 0), ("fence-peer", None), ("fence-peer", None, 9),
    )] == [
        "call helper name:r0 peer-node-id:1 conn-name:beta volume:0 minor:0 helper:before-resync-source",
        "response helper name:r0 peer-node-id:1 conn-name:beta volume:0 minor:0 helper:before-resync-source status:0",
        "call helper name:r0 peer-node-id:1 conn-name:beta helper:fence-peer",
        "response helper name:r0 peer-node-id:1 conn-name:beta helper:fence-peer status:2304",
    ]  # fmt: skip


def test_a_resource_that_is_gone_is_destroyed_from_its_ends() -> None:
    events = Events()
    events.update(STATUS, "exists")
    assert events.names() == ["r0"]
    assert events.gone("r0") == [
        "destroy path name:r0 peer-node-id:1 conn-name:beta local:ipv4:10.0.0.1:7788 "
        "peer:ipv4:10.0.0.2:7788",
        "destroy peer-device name:r0 peer-node-id:1 conn-name:beta volume:0",
        "destroy device name:r0 volume:0",
        "destroy connection name:r0 peer-node-id:1 conn-name:beta",
        "destroy resource name:r0",
    ]
    assert events.names() == [] and events.gone("r0") == []


def test_new_and_removed_volumes_are_created_and_destroyed() -> None:
    events = Events()
    events.update(STATUS, "exists")
    second = replace(VOLUME, number=1, minor=1)
    both = replace(STATUS, volumes=(VOLUME, second))
    (line,) = events.update(both)
    assert line.startswith("create device name:r0 volume:1 minor:1 backing_dev:/dev/vg/r0 disk:UpToDate")
    assert events.update(STATUS) == ["destroy device name:r0 volume:1"]
