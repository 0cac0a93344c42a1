"""Network namespaces on one bridge, which stands in a namespace of its own."""

import ipaddress
from pathlib import Path
from typing import Final

import attrs

from agent.lab.leftovers import lab_name
from agent.lab.processes import call

SUBNET: Final = ipaddress.ip_network("10.66.0.0/24")
"""Seen inside the lab's namespaces only, so every lab can have the same."""


@attrs.frozen
class Host:
    """One machine of the lab as the network sees it: its namespace file and its address on the bridge."""

    name: str
    netns: Path
    address: str

    def enter(self) -> list[str]:
        """The words before a command that run it in this host's network.

        Not `ip netns exec`, which makes a new mount namespace without cgroups, and runc then fails.
        """
        return ["nsenter", f"--net={self.netns}", "--"]


def _ip(netns: str, *words: str) -> None:
    # Not `ip -n`, which remounts / and so fails in a chroot.
    call("nsenter", f"--net=/run/netns/{netns}", "--", "ip", *words)


def make_network(lab: Path, names: list[str]) -> list[Host]:
    """Make the bridge and one host per name; `agent.lab.leftovers` removes them."""
    lan = lab_name(lab, "lan")
    call("ip", "netns", "add", lan)
    _ip(lan, "link", "add", "lan", "type", "bridge")
    _ip(lan, "link", "set", "lan", "up")
    hosts = []
    for number, name in enumerate(names, 1):
        netns = lab_name(lab, name)
        address = str(SUBNET[number])
        call("ip", "netns", "add", netns)
        _ip(lan, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", netns)
        _ip(lan, "link", "set", f"port{number}", "master", "lan", "up")
        _ip(netns, "address", "add", f"{address}/{SUBNET.prefixlen}", "dev", "eth0")
        _ip(netns, "link", "set", "lo", "up")
        _ip(netns, "link", "set", "eth0", "up")
        hosts.append(Host(name, Path("/run/netns") / netns, address))
    return hosts
