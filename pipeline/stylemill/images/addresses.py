"""Look up the host of a URL, and refuse addresses that the URL of a manifest may not lead to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from stylemill.errors import DownloadError, ImageError
from stylemill.images.messages import one_line

# Where clouds serve credentials to any process inside them. 169.254.0.0/16 and fe80::/10 are refused as a whole.
_METADATA = {ipaddress.ip_address(ip) for ip in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def look_up(host: str, port: int, allow_private: bool, name: str) -> list[str]:
    """The addresses of `host`, all of them allowed; `name` names the URL in messages.

    Raises ImageError where the host does not exist or has a refused address, DownloadError where the lookup fails.
    """
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise ImageError(f"{name}: there is no such host; correct the URL or remove its rows") from None
        raise DownloadError(f"{name}: its host cannot be looked up just now: {one_line(error)}") from None
    except UnicodeError:
        raise ImageError(f"{name}: its host is no valid name; correct the URL") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for address in addresses:
        if problem := address_problem(address, allow_private):
            raise ImageError(f"{name}: its host is {address}, {problem}")
    return addresses


def address_problem(address: str, allow_private: bool) -> str | None:
    """Why the URL of a manifest may not lead to `address`; None if it may."""
    ip = _embedded_ipv4(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_link_local or ip in _METADATA:
        return "where clouds keep their metadata, which is never read"
    if (ip.is_multicast or not ip.is_global) and not allow_private:
        return "not one of the public Internet; if these servers are yours, set inputs.allow_private_addresses: true"
    return None


def _embedded_ipv4(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 address stands for (NAT64, IPv4-mapped, 6to4); any other address unchanged."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip
