"""drbd.conf as the rest of the tools see it: `load` a file, ask it what a node runs, print it.

    configuration = load("/etc/tandem.conf")       # ConfigError: FILE:LINE: what was expected
    resources = configuration.for_node(default_node())

Reading order of the parts: `conf_syntax` (text to statements), `conf_read` with `conf_words` and `conf_nbd`
(statements to sections), `conf_model` (the sections), `conf_options` (what each option takes),
`conf_inherit` (who inherits what), `conf_check` (what does not fit together), `conf_resolve` (what one node
runs), `conf_dump` (printing).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from tandem.repl.config import ResourceConfig

from . import conf_dump, conf_resolve
from .conf_inherit import host_volumes
from .conf_model import STDIN, ConfigError, Resource, Section, Volume
from .conf_nbd import NbdUri, UriProblem, parse_nbd_uri
from .conf_options import GLOBAL, Kind, Value, convert
from .conf_resolve import check, is_local
from .paths import default_config, default_node

__all__ = [
    "ConfigError", "Configuration", "GlobalOptions", "NbdUri", "Resource", "UriProblem", "address_problem",
    "check", "default_config", "default_node", "dump", "dump_xml", "load", "parse_nbd_uri", "up_commands",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The global section; timeouts and intervals in seconds."""

    dialog_refresh: int = 1
    minor_count: int = 32
    disable_ip_verification: bool = False
    usage_count: str = "ask"
    udev_always_use_vnr: bool = False
    cmd_timeout_short: int = 5
    cmd_timeout_medium: int = 121
    cmd_timeout_long: int = 600


@dataclass(frozen=True, slots=True)
class Configuration:
    """Everything that was read from *file* (an absolute path) and the files it includes."""

    file: str
    global_options: GlobalOptions
    resources: dict[str, Resource]  # as written, with all hosts; nothing inherited
    warnings: tuple[str, ...] = ()  # each one names its file and line
    common: Resource | None = None
    global_section: Section = field(default_factory=Section)
    given_minors: dict[tuple[str, int], int] = field(default_factory=dict)

    def for_node(self, node: str) -> dict[str, ResourceConfig]:
        """The resources with a section for *node*, in file order. ConfigError when one is no pair for it."""
        return conf_resolve.for_node(self, node)

    def ignored(self, node: str) -> list[str]:
        """The names of the resources *node* has no part in."""
        return [name for name, res in self.resources.items() if conf_resolve.my_host(res, node) is None]

    def minor(self, resource: str, volume: Volume) -> int:
        """The minor number of a volume: its own, or the one given to it because its device is a URI."""
        assert volume.device is not None
        return volume.device.minor if volume.device.minor >= 0 else self.given_minors[resource, volume.number]


def load(path: str) -> Configuration:
    """Read the configuration file *path*; ``-`` is standard input.

    Errors: ConfigError with file, line and what was expected, for anything that is no valid configuration
    (also a file that cannot be read).
    """
    from . import conf_check, conf_read  # late, because this imports Lark

    reader = conf_read.Reader()
    if path == "-":
        reader.read_stdin()
    else:
        reader.read_file(path)
    configuration = Configuration(
        file=STDIN if path == "-" else os.path.abspath(path),
        global_options=_global_options(reader.globals),
        resources=reader.resources,
        common=reader.common,
        global_section=reader.globals,
        given_minors=_given_minors(reader.resources),
    )
    return replace(configuration, warnings=(*reader.warnings, *conf_check.check_all(configuration)))


def _global_options(section: Section) -> GlobalOptions:
    values: dict[str, Value] = {}
    for option in section.options:
        spec = GLOBAL[option.name]
        values[spec.field] = True if spec.kind is Kind.FLAG else convert(spec, option.value or "")
    return GlobalOptions(**values)  # type: ignore[arg-type]  # the table and the fields are compared by a test


def _given_minors(resources: dict[str, Resource]) -> dict[tuple[str, int], int]:
    """A minor number for each volume whose device is a URI without one: those left free, in file order.

    Both hosts of a volume get the same number. It changes when resources are added before it; who wants
    it to stay writes ``minor N`` behind the URI.
    """
    used: set[int] = set()
    waiting: dict[tuple[str, int], None] = {}
    for resource in resources.values():
        for host in resource.hosts:
            for number, volume in host_volumes(resource, host).items():
                if volume.device is not None and volume.device.minor >= 0:
                    used.add(volume.device.minor)
                elif volume.device is not None:
                    waiting[resource.name, number] = None
    free = (minor for minor in range(len(used) + len(waiting)) if minor not in used)
    return dict(zip(waiting, free, strict=False))


def address_problem(configuration: Configuration, config: ResourceConfig) -> str | None:
    """Why the network commands cannot work here: our address is not configured on this host.

    None when it is, or when ``disable-ip-verification`` says not to look.
    """
    if configuration.global_options.disable_ip_verification or is_local(config.address):
        return None
    where = f"{config.file}: in resource {config.name}, on {config.node}"
    return f"{where}:\n\tIP {config.address.host} not found on this host."


def dump(
    configuration: Configuration, node: str, names: list[str] | None = None, *, merged: bool = False
) -> str:
    """What ``dump`` prints: the configuration in canonical form, for *names* or as a whole.

    *merged* shows inherited options in each resource (``dump -d -v``).
    """
    return conf_dump.dump(configuration, node, names, merged=merged)


def dump_xml(configuration: Configuration, names: list[str] | None = None) -> str:
    """What ``dump-xml`` prints."""
    return conf_dump.dump_xml(configuration, names)


def up_commands(configuration: Configuration, node: str, resource: str) -> list[str]:
    """The commands that ``-d up RESOURCE`` prints with a DRBD 8.4 kernel driver, one per line."""
    return conf_dump.up_commands(configuration, node, resource)
