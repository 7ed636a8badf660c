"""Which addresses may be opened: public ones of the web, and nothing of the machine's own networks.

A page that an agent reads can name any address. Those that lead back into the network of its user (routers, databases,
the metadata service of a cloud) are refused before a connection is made, and the connection goes to the very address
that was checked: a name that points elsewhere a moment later gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Prefixes whose last bits are an IPv4 address that a gateway may connect to: RFC 6052, RFC 8215, RFC 4291.
_CARRIES_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))
# Special networks that some versions of Python's ipaddress take for public (IANA's registries of special-purpose
# addresses), and the address at which Azure's machines are managed.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("192.0.0.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.175.48.0/24"),
            *(
                "168.63.129.16/32",
                "100::/64",
                "2001::/23",
                "2001:db8::/32",
                "2620:4f:8000::/48",
                "3fff::/20",
                "5f00::/16",
            ),
        ),
    )
)
_NAMES_OF_OWN = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home", "corp", "arpa", "onion")


@dataclass(frozen=True)
class Target:
    """Where a URL leads: its host (lower case, in ASCII) and port."""

    scheme: str
    host: str
    port: int


def is_web(url: str) -> bool:
    """Whether an address is one of the web, rather than of a file, an archive or a finding."""
    return url.startswith(("http://", "https://"))


class BlockedError(ValueError):
    """An address that must not be opened; the message says why."""


def parse_target(url: str, ports: Sequence[int]) -> Target:
    """The host and port of a URL that may be asked for, before its name is resolved.

    Raises:
        BlockedError: another scheme or port, credentials, an unusual spelling of a host.
    """
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise BlockedError("white space, control characters or backslashes in the address")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BlockedError(f"not a valid address ({error})") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise BlockedError(f"only http and https are opened, not {scheme or 'an address without a scheme'}")
    if "@" in parts.netloc:
        raise BlockedError("a user name in the address")
    host = (parts.hostname or "").rstrip(".")
    if not host or "%" in host:
        raise BlockedError("no host, or a host with % in it")
    if port is None:
        port = 443 if scheme == "https" else 80
    if port not in ports:
        raise BlockedError(f"port {port} is not opened (allowed: {', '.join(map(str, ports))})")
    if ":" not in host:
        host = _ascii_host(host)
    return Target(scheme, host, port)


def _ascii_host(host: str) -> str:
    import idna

    try:
        # UTS 46 also turns full-width and circled digits and dots into plain ones, so that what follows sees them.
        ascii_host = idna.encode(host, uts46=True).decode().lower() if not host.isascii() else host.lower()
    except (idna.IDNAError, UnicodeError):
        raise BlockedError(f"not a valid host name: {host!r}") from None
    last = ascii_host.rpartition(".")[2]
    # 2130706433, 0x7f.1, 0177.0.0.1: resolvers take them for addresses. Only the usual form is read here.
    if re.fullmatch(r"\d+|0x[0-9a-f]*", last):
        try:
            ipaddress.IPv4Address(ascii_host)
        except ValueError:
            raise BlockedError(f"an unusual spelling of an address: {host!r}") from None
    elif last in _NAMES_OF_OWN:
        raise BlockedError(f"{host!r} names a machine of a private network")
    elif not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", ascii_host):
        raise BlockedError(f"not a valid host name: {host!r}")
    return ascii_host


def check_address(text: str, allowed: Sequence[Network] = ()) -> Address:
    """An IP address that may be connected to.

    Args:
        text: the address, as a resolver gives it.
        allowed: networks of the user's own that may be opened although they are not public.

    Raises:
        BlockedError: it is private, local, shared, reserved, a group's, or carries such an address within.
    """
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        raise BlockedError(f"not an address: {text!r}") from None
    for form in _forms(address):
        if any(form.version == network.version and form in network for network in allowed):
            continue
        if (
            not form.is_global
            or form.is_private
            or form.is_loopback
            or form.is_link_local
            or form.is_multicast
            or form.is_reserved
            or form.is_unspecified
            or (isinstance(form, ipaddress.IPv6Address) and form.is_site_local)
            or any(form.version == network.version and form in network for network in _SPECIAL)
        ):
            raise BlockedError(f"{text} is not an address of the public internet")
    return address


def _forms(address: Address) -> list[Address]:
    """The addresses that a connection might end at: the address itself, or the IPv4 address that it carries."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner: list[Address] = []
    if address.sixtofour is not None:
        inner.append(address.sixtofour)
    if address.teredo is not None:
        inner += address.teredo
    if any(address in network for network in _CARRIES_IPV4):
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        # A translated address is as public as what it carries; the prefix itself is marked as special.
        return inner if address in _CARRIES_IPV4[0] else [address, *inner]
    return [address, *inner]
