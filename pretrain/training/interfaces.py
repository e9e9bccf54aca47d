"""Which network interface the ranks talk over: named, so that gloo and NCCL cannot pick the wrong one by themselves.

Gloo resolves its own host name, which many distributions map to 127.0.1.1, and then waits at the loopback for partners
on other machines. The interface that leads to MASTER_ADDR is the right one by construction.
"""

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import MutableMapping

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: the address of an interface


def name_interfaces(environment: MutableMapping[str, str]) -> str | None:
    """Set the variables that are not set to the interface that leads to MASTER_ADDR; its name.

    None, and nothing set, where the ranks are on this machine alone, or the way cannot be found.
    """
    name = interface_towards(environment.get("MASTER_ADDR", ""))
    if name is None or environment.get("WORLD_SIZE", "1") == environment.get("LOCAL_WORLD_SIZE", "1"):
        return None
    for variable in VARIABLES:
        environment.setdefault(variable, name)
    return name


def interface_towards(address: str) -> str | None:
    """The interface over which a packet to `address` (a name or a number) would leave; of our own address the interface
    that carries it. None for a loopback address, and where it is not known.
    """
    if not address:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the kernel only looks up the way
            ours = probe.getsockname()[0]
    except OSError:
        return None
    if ipaddress.ip_address(ours).is_loopback:
        return None
    return next((name for name in _interfaces() if _address(name) == ours), None)


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address(interface: str) -> str | None:
    """The first IPv4 address of an interface."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", os.fsencode(interface)[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:
        return None
