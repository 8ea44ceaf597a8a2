"""Configuration files that several tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.tools.conf import ConfigError, Configuration, load

RESOURCE = "device /dev/drbd0; disk /dev/x; meta-disk internal;"
HOSTS = "on a { address 10.0.0.1:7000; } on b { address 10.0.0.2:7000; }"

# The example of the configuration's command reference: what `-d up r0` prints for it is known.
EXAMPLE = """\
global { usage-count no; disable-ip-verification; minor-count 64; }
common {
  net { protocol C; ping-int 10; max-buffers 8k; after-sb-0pri discard-zero-changes; allow-two-primaries no; }
  disk { on-io-error detach; resync-rate 33M; c-plan-ahead 15; }
}
resource r0 {
  net { shared-secret "foo bar"; cram-hmac-alg sha1; sndbuf-size 512K; }
  disk { disk-barrier no; disk-flushes; c-max-rate 100M; }
  options { cpu-mask 3; }
  device /dev/drbd5 minor 5;
  on alpha { disk /dev/vg/a; address 10.1.1.1:7788; meta-disk internal; }
  on beta  { disk /dev/vg/b; address ipv4 10.1.1.2:7788; meta-disk /dev/vg/meta [3]; }
}
"""


def resource(more: str = "", name: str = "r0", volume: str = RESOURCE, hosts: str = HOSTS) -> str:
    """A resource section; *more* stands behind the hosts."""
    return f"resource {name} {{\n {volume}\n {hosts}\n {more}\n}}\n"


def loaded(directory: Path, text: str | bytes, name: str = "t.conf") -> Configuration:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(str(path))


def refusal(directory: Path, text: str | bytes) -> str:
    """The message for *text* in a file t.conf, without its directory; it is one line."""
    with pytest.raises(ConfigError) as caught:
        loaded(directory, text)
    assert caught.value.exit_code == 10
    message = str(caught.value)
    assert message.startswith(f"{directory}/t.conf") and "\n" not in message
    return message.replace(f"{directory}/", "")
