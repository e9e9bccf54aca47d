"""Makes of a table's URL the request that it means: sent byte for byte where it is valid, mended only where it is not.

A signed URL is valid for one spelling alone. Unquoting and quoting it again, as URL libraries like to, turns %2B into +
and gets a 403.
"""

import re
from urllib.parse import urljoin

from yarl import URL

# RFC 3986, appendix A: unreserved, gen-delims, sub-delims, and % where two hexadecimal digits follow.
_ILLEGAL = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]")
_PARTS = re.compile(r"(?s)(https?)://([^/?#]*)([^#]*)", re.IGNORECASE)


def parse_url(text: str) -> URL:
    """Returns the URL as it is to be sent: only characters that no URL may hold are percent-encoded (as UTF-8), only
    the host's name is brought to its ASCII form. Raises ValueError for what is no http or https URL."""
    parts = _PARTS.match(text.strip())
    if parts is None:
        raise ValueError(f"{text[:200]!r} is no http or https URL")
    scheme, authority, rest = parts.groups()
    user, at, host = authority.rpartition("@")
    host, _, port = host.partition(":") if not host.startswith("[") else (host, "", "")
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError(f"host {host[:200]!r} has no ASCII form") from None
    if not host or _ILLEGAL.search(host) or (port and not port.isdigit()):
        raise ValueError(f"{authority[:200]!r} is no host")
    if rest[:1] in ("", "?"):
        rest = "/" + rest
    return URL(f"{scheme.lower()}://{_legal(user)}{at}{host}{':' + port if port else ''}{_legal(rest)}", encoded=True)


def join_url(base: URL, location: str) -> URL:
    """Returns where a redirect leads, as its server spelled it. Raises ValueError as `parse_url` does."""
    location = location.strip()
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", location):
        return parse_url(location)
    if location.startswith("//"):
        return parse_url(f"{base.scheme}:{location}")
    if location.startswith("/"):  # urljoin would take its dots out
        return parse_url(f"{base.scheme}://{base.raw_authority}{location}")
    return parse_url(urljoin(str(base), location))


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda found: _quoted(found[0]), text)


def _quoted(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
