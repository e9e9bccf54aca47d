"""Decides which network addresses a list of URLs may lead to: public ones, and networks that the user names.

A URL list is other people's text. Without this check a row such as http://169.254.169.254/ (or a public name or a
redirect that leads there) would read the cloud's own metadata service, or a machine behind the firewall, into a set.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from data_pipeline.errors import UserError

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits


class PrivateAddressError(OSError):
    """A host has no address that the rules allow."""


class AddressRule:
    """Decides on single addresses: public, or in one of `networks` (CIDR notation, such as 10.1.0.0/16)."""

    def __init__(self, networks: Sequence[str] = ()) -> None:
        try:
            self._networks = [ip_network(network) for network in networks]
        except ValueError as error:
            raise UserError(f"{error}: give networks as 10.1.0.0/16, single machines as 10.1.2.3") from None

    def allows(self, address: str) -> bool:
        """Tells whether the rules allow `address`; False for text that is no address."""
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if any(found in network for network in self._networks):
            return True
        return _is_public(found)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast
