"""`status`, `status --json`, the 8.4 one-line answers and sh-status, against drbdsetup's forms."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tandem.repl.config import (
    AfterSb,
    DiskOptions,
    Endpoint,
    Fencing,
    MetaDisk,
    NetOptions,
    ResourceConfig,
    VolumeConfig,
)
from tandem.repl.errors import Refusal
from tandem.repl.events import (
    ConnectionStatus,
    PeerVolumeStatus,
    ResourceStatus,
    SyncProgress,
    VolumeStatus,
)
from tandem.tools.status import (
    ETA_UNKNOWN,
    cstate_line,
    dstate_line,
    role_line,
    sh_status,
    status_json,
    status_text,
)
from tandem.tools.values import pack, unpack

KIB = 1024

VOLUME = VolumeStatus(
    number=0, minor=0, disk="UpToDate", client=False, open=True, size=262100 * KIB, read=6108 * KIB,
    written=0, al_writes=8, bm_writes=0, upper_pending=0, lower_pending=0, al_suspended=False, blocked="no",
    backing_device="/dev/vg/r0", flags="04CB0077531E9CE3:0:0:0:1:1:1:1:0:0:0",
)  # fmt: skip

PEER_VOLUME = PeerVolumeStatus(
    number=0, replication="SyncSource", peer_disk="Inconsistent", resync_suspended="no", received=0,
    sent=6108 * KIB, out_of_sync=255992 * KIB, pending=0, unacked=0, done=2.33,
    sync=SyncProgress(
        total=262100 * KIB, left=255992 * KIB, failed=0, started_s=3.0, paused_s=0.0, rate=2.0 * 1024 * KIB,
        average=1.5 * 1024 * KIB, eta_s=125.0,
    ),
)  # fmt: skip

PEER = ConnectionStatus(
    name="beta", node_id=1, connection="Connected", cstate="SyncSource", role="Secondary", congested=False,
    ap_in_flight=0, rs_in_flight=4096, protocol_version=101, local="ipv4:10.0.0.1:7788",
    remote="ipv4:10.0.0.2:7788", configured=True, volumes=(PEER_VOLUME,),
)  # fmt: skip

SYNCING = ResourceStatus(
    name="r0", node_id=0, role="Primary", suspended="no", write_ordering="flush", may_promote=False,
    promotion_score=10101, volumes=(VOLUME,), connection=PEER,
)  # fmt: skip

IN_SYNC_VOLUME = replace(
    PEER_VOLUME, replication="Established", peer_disk="UpToDate", out_of_sync=0, done=None, sync=None
)
IN_SYNC = replace(SYNCING, connection=replace(PEER, cstate="Connected", volumes=(IN_SYNC_VOLUME,)))

ALONE_VOLUME = replace(IN_SYNC_VOLUME, replication="Off", peer_disk="DUnknown")
CONNECTING = replace(PEER, connection="Connecting", cstate="WFConnection", role="Unknown")
FENCING = replace(
    SYNCING,
    suspended="fencing",
    volumes=(replace(VOLUME, blocked="upper"), replace(VOLUME, number=1, minor=1, blocked="upper")),
    connection=replace(CONNECTING, volumes=(ALONE_VOLUME, replace(ALONE_VOLUME, number=1))),
)


def test_short_form_during_resync() -> None:
    assert status_text(SYNCING) == (
        "r0 role:Primary\n"
        "  disk:UpToDate\n"
        "  beta role:Secondary\n"
        "    replication:SyncSource peer-disk:Inconsistent done:2.33\n"
        "\n"
    )


def test_short_form_in_sync_names_only_the_disks() -> None:
    assert status_text(IN_SYNC) == (
        "r0 role:Primary\n  disk:UpToDate\n  beta role:Secondary\n    peer-disk:UpToDate\n\n"
    )


def test_short_form_several_volumes_not_connected_suspended() -> None:
    assert status_text(FENCING) == (
        "r0 role:Primary suspended:fencing\n"
        "  volume:0 disk:UpToDate blocked:upper\n"
        "  volume:1 disk:UpToDate blocked:upper\n"
        "  beta connection:Connecting\n"
        "\n"
    )


def test_verbose_statistics_wraps_at_80_columns() -> None:
    assert status_text(SYNCING, verbose=True, statistics=True) == (
        "r0 node-id:0 role:Primary suspended:no force-io-failures:no\n"
        "    write-ordering:flush\n"
        "  volume:0 minor:0 disk:UpToDate backing_dev:/dev/vg/r0 quorum:yes open:yes\n"
        "      size:262100 read:6108 written:0 al-writes:8 bm-writes:0 upper-pending:0\n"
        "      lower-pending:0 al-suspended:no blocked:no\n"
        "  beta node-id:1 connection:Connected role:Secondary tls:no congested:no\n"
        "      ap-in-flight:0 rs-in-flight:8\n"
        "    volume:0 replication:SyncSource peer-disk:Inconsistent done:2.33\n"
        "        resync-suspended:no\n"
        "        received:0 sent:6108 out-of-sync:255992 pending:0 unacked:0 dbdt1:2.00\n"
        "        eta:125\n"
        "\n"
    )


def test_statistics_leave_out_of_sync_away_when_it_is_zero() -> None:
    text = status_text(IN_SYNC, statistics=True)
    assert "    peer-disk:UpToDate\n        received:0 sent:6108\n" in text
    assert "      size:262100 read:6108 written:0\n" in text


def test_diskless_tells_scripts_whether_it_is_a_client() -> None:
    diskless = replace(IN_SYNC, volumes=(replace(VOLUME, disk="Diskless", client=False),))
    assert "  disk:Diskless client:no\n" in status_text(diskless)
    assert "  disk:Diskless\n" in status_text(diskless, terminal=True)


def test_paused_resync_says_who_paused_it() -> None:
    paused = replace(PEER_VOLUME, replication="PausedSyncS", resync_suspended="user,peer")
    text = status_text(replace(SYNCING, connection=replace(PEER, volumes=(paused,))))
    (line,) = text.replace("\n        ", " ").splitlines()[3:4]
    assert line.startswith("    replication:PausedSyncS peer-disk:Inconsistent done:2.33 ")
    assert line.endswith(" resync-suspended:user,peer")


# -------------------------------------------------------------------------------------------- JSON


def test_json_has_drbdsetups_keys_in_its_order() -> None:
    (resource,) = json.loads(status_json([IN_SYNC]))
    assert list(resource) == [
        "name", "node-id", "role", "suspended", "suspended-user", "suspended-no-data", "suspended-fencing",
        "suspended-quorum", "force-io-failures", "write-ordering", "devices", "connections",
        "may_promote", "promotion_score",
    ]  # fmt: skip
    (device,) = resource["devices"]
    assert list(device) == [
        "volume", "minor", "disk-state", "client", "open", "quorum", "size", "read", "written", "al-writes",
        "bm-writes", "upper-pending", "lower-pending",
    ]  # fmt: skip
    assert (device["size"], device["read"], device["quorum"], device["open"]) == (262100, 6108, True, True)
    (connection,) = resource["connections"]
    assert list(connection) == [
        "peer-node-id", "name", "connection-state", "congested", "peer-role", "tls", "ap-in-flight",
        "rs-in-flight", "paths", "peer_devices",
    ]  # fmt: skip
    assert connection["rs-in-flight"] == 8
    assert connection["paths"] == [
        {
            "this_host": {"address": "10.0.0.1", "port": 7788, "family": "ipv4"},
            "remote_host": {"address": "10.0.0.2", "port": 7788, "family": "ipv4"},
            "established": True,
        }
    ]
    assert connection["peer_devices"] == [
        {
            "volume": 0, "replication-state": "Established", "peer-disk-state": "UpToDate",
            "peer-client": False, "resync-suspended": "no", "received": 0, "sent": 6108, "out-of-sync": 0,
            "pending": 0, "unacked": 0, "has-sync-details": False, "has-online-verify-details": False,
            "percent-in-sync": 100.0,
        }
    ]  # fmt: skip


def test_json_of_a_resync_has_its_details() -> None:
    (resource,) = json.loads(status_json([SYNCING]))
    (peer,) = resource["connections"][0]["peer_devices"]
    assert peer["has-sync-details"] is True
    assert peer["rs-total"] == 262100 * 2
    assert peer["percent-in-sync"] == pytest.approx(2.33)
    assert peer["percent-resync-done"] == 2.33
    assert peer["estimated-seconds-to-finish"] == 125
    assert peer["db/dt [MiB/s]"] == 1.5
    assert "ov-left" not in peer and peer["rs-failed"] == 0


def test_json_of_a_verify_has_its_position_and_no_estimate() -> None:
    sync = SyncProgress(8192, 4096, 0, 1.0, 0.0, 0.0, 0.0, None, position=4096)
    verify = replace(PEER_VOLUME, replication="VerifyS", sync=sync, done=50.0)
    (resource,) = json.loads(status_json([replace(SYNCING, connection=replace(PEER, volumes=(verify,)))]))
    (peer,) = resource["connections"][0]["peer_devices"]
    assert (peer["ov-position"], peer["ov-left"], peer["ov-stop-sector"]) == (8, 8, 16)
    assert peer["estimated-seconds-to-finish"] == ETA_UNKNOWN
    assert peer["has-online-verify-details"] is True and "rs-failed" not in peer


def test_json_suspended_by_fencing_and_ipv6() -> None:
    status = replace(FENCING, connection=replace(FENCING.connection, local="ipv6:[fe80::1%eth0]:7788"))
    (resource,) = json.loads(status_json([status]))
    flags = [key for key in resource if key.startswith("suspended") and resource[key]]
    assert flags == ["suspended", "suspended-fencing"]
    this_host = resource["connections"][0]["paths"][0]["this_host"]
    assert this_host == {"address": "fe80::1%eth0", "port": 7788, "family": "ipv6"}


def test_json_of_nothing_is_an_empty_array() -> None:
    assert json.loads(status_json([])) == []


# ------------------------------------------------------------------------------------- 8.4 answers


def test_one_line_answers_local_then_peer() -> None:
    assert role_line(SYNCING, VOLUME) == "Primary/Secondary"
    assert cstate_line(SYNCING, VOLUME) == "SyncSource"
    assert dstate_line(SYNCING, VOLUME) == "UpToDate/Inconsistent"
    assert cstate_line(IN_SYNC, VOLUME) == "Connected"
    assert cstate_line(FENCING, VOLUME) == "WFConnection"
    assert role_line(FENCING, VOLUME) == "Primary/Unknown"
    assert dstate_line(FENCING, FENCING.volumes[1]) == "UpToDate/DUnknown"


def test_nothing_attached_and_nothing_connected_is_unconfigured() -> None:
    alone = replace(CONNECTING, connection="StandAlone", cstate="StandAlone", configured=False)
    volume = replace(VOLUME, disk="Diskless")
    status = replace(SYNCING, role="Secondary", volumes=(volume,), connection=alone)
    assert [line(status, volume) for line in (role_line, cstate_line, dstate_line)] == ["Unconfigured"] * 3
    assert role_line(replace(status, role="Primary"), volume) == "Primary/Unknown"


def test_sh_status_configured() -> None:
    assert sh_status("r0", 0, SYNCING, VOLUME) == (
        "_minor=0\n_res_name=r0\n_volume=0\n_known=Configured\n\n"
        "_cstate=SyncSource\n_role=Primary\n_peer=Secondary\n_disk=UpToDate\n_pdsk=Inconsistent\n\n"
        "_flags_susp=\n_flags_aftr_isp=\n_flags_peer_isp=\n_flags_user_isp=\n\n"
        "_resynced_percent=2.3\n\n"
        "_sh_status_process\n\n\n"
    )


def test_sh_status_flags_suspension_by_the_user_only() -> None:
    assert "_flags_susp=\n" in sh_status("r0", 0, FENCING, VOLUME)
    by_user = replace(FENCING, suspended="user,fencing")
    assert "_flags_susp=1\n" in sh_status("r0", 0, by_user, VOLUME)
    paused = replace(PEER_VOLUME, replication="PausedSyncS", resync_suspended="user,peer,dependency")
    text = sh_status("r0", 0, replace(SYNCING, connection=replace(PEER, volumes=(paused,))), VOLUME)
    assert "_flags_aftr_isp=1\n_flags_peer_isp=1\n_flags_user_isp=1\n" in text


def test_sh_status_unconfigured_and_not_there() -> None:
    alone = replace(CONNECTING, connection="StandAlone", cstate="StandAlone")
    volume = replace(VOLUME, disk="Diskless")
    status = replace(SYNCING, role="Secondary", volumes=(volume,), connection=alone)
    text = sh_status("r0", 0, status, volume)
    assert "_known=Unconfigured\n\n_cstate=Unconfigured\n_role=\n_peer=\n_disk=\n_pdsk=\n" in text
    missing = sh_status("r0", 3, None, None)
    assert missing.startswith("_minor=3\n_res_name=r0\n_volume=-1\n")
    assert "\n_known=NA # not available or not yet created\n" in missing


# ------------------------------------------------------------------------- values over the socket


def test_values_survive_the_control_socket() -> None:
    for status in (SYNCING, IN_SYNC, FENCING):
        assert unpack(ResourceStatus, json.loads(json.dumps(pack(status)))) == status
    refusal = Refusal(-2, "Need access to UpToDate data", "Connect.", ("one", "two"))
    assert unpack(Refusal, json.loads(json.dumps(pack(refusal)))) == refusal
    config = ResourceConfig(
        "r0", "alpha", "beta", Endpoint("ipv4", "10.0.0.1", 7788), Endpoint("ipv4", "10.0.0.2", 7788),
        (VolumeConfig(0, 5, "/dev/drbd5", "/dev/vg/a", MetaDisk("indexed", "/dev/vg/m", 3),
                      DiskOptions(fencing=Fencing.RESOURCE_ONLY)),),
        NetOptions(after_sb_0pri=AfterSb.DISCARD_ZERO_CHANGES), handlers={"fence-peer": "/bin/true"},
    )  # fmt: skip
    assert unpack(ResourceConfig, json.loads(json.dumps(pack(config)))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 5}, "ResourceStatus.name must be str"),
        ({"may_promote": 1}, "ResourceStatus.may_promote must be bool"),
        ({"volumes": {}}, "ResourceStatus.volumes must be a list"),
        ({"connection": []}, "ConnectionStatus must be an object"),
    ],
)
def test_malformed_values_are_a_sentence(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unpack(ResourceStatus, pack(SYNCING) | change)


def test_missing_fields_are_a_sentence_and_unknown_ones_are_ignored() -> None:
    with pytest.raises(ValueError, match="missing"):
        unpack(Refusal, {"code": -2})
    assert unpack(Refusal, {"code": -2, "text": "x", "newer": True}) == Refusal(-2, "x")
