"""Reads what a site asks of programs: robots.txt, opt-outs in an answer's headers, and when to come back.

robots.txt is read as RFC 9309 has it: the group of our product token, else `*`; the longest matching rule decides.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote_to_bytes

MAX_BYTES = 500 * 1024  # RFC 9309, section 2.5: at least this much is to be parsed

NO_AI = {"noai", "noimageai"}  # as DeviantArt introduced them; img2dataset heeds the same


@dataclass(frozen=True)
class Robots:
    """The rules for one product token: (path pattern, allowed), in no order."""

    rules: tuple[tuple[str, bool], ...]

    def allows(self, path: str) -> bool:
        """Tells whether `path` (with its query) may be fetched. Of rules equally long, allow wins (section 2.2.2)."""
        if path == "/robots.txt" or not self.rules:
            return True
        best, allowed = -1, True
        path = _normal(path)
        for pattern, allow in self.rules:
            if len(pattern) >= best and _matches(pattern, path) and (len(pattern) > best or allow):
                best, allowed = len(pattern), allow
        return allowed


EVERYTHING = Robots(())
NOTHING = Robots((("/", False),))


def parse_robots(text: str, token: str) -> Robots:
    """Parses the rules that `text` has for the product token `token` (compared without case)."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    agents: list[str] = []
    open_group = False  # user-agent lines in a row share the rules that follow
    for line in text.lstrip("\ufeff").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            if not open_group:
                agents = []
            open_group = True
            name = re.match(r"[A-Za-z_-]+|\*", value)
            if name:
                agents.append(name[0].lower())
                groups.setdefault(name[0].lower(), [])
        elif key in ("allow", "disallow"):
            open_group = False
            if value:  # an empty disallow allows everything
                for agent in agents:
                    groups[agent].append((_normal(value), key == "allow"))
    return Robots(tuple(groups.get(token.lower(), groups.get("*", []))))


def opted_out(headers: Mapping[str, str], token: str) -> bool:
    """Tells whether the answer reserves its use for machine learning: X-Robots-Tag noai or noimageai, for all or for
    `token`; or the TDM Reservation Protocol's header."""
    if headers.get("TDM-Reservation", "").strip() == "1":
        return True
    lines = headers.getall("X-Robots-Tag", []) if hasattr(headers, "getall") else [headers.get("X-Robots-Tag", "")]
    for line in lines:
        agent = ""
        for part in line.lower().split(","):
            name, colon, value = part.partition(":")
            if colon and name.strip() not in ("unavailable_after", "max-snippet", "max-image-preview"):
                agent, part = name.strip(), value
            if part.strip() in NO_AI and agent in ("", "*", token.lower()):
                return True
    return False


def retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that the server asks to wait (RFC 9110, section 10.2.3: seconds or a date)."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _matches(pattern: str, path: str) -> bool:
    """Matches a pattern: `*` is any characters, a last `$` the end; without `$` the pattern is a prefix of the path."""
    anchored = pattern.endswith("$")
    pieces = (pattern[:-1] if anchored else pattern).split("*")
    if not path.startswith(pieces[0]):
        return False
    position = len(pieces[0])
    for number, piece in enumerate(pieces[1:], 2):
        if anchored and number == len(pieces):
            return len(path) - len(piece) >= position and path.endswith(piece)
        position = path.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return not anchored or position == len(path)


def _normal(path: str) -> str:
    """Gives equal paths one spelling: percent-encoded where necessary, and only there."""
    parts = re.split(r"(%2[fF]|%3[fF])", path)  # an encoded slash or question mark is no separator
    return "".join(
        part.upper() if number % 2 else quote(unquote_to_bytes(part), safe="/?*$=&:@!'(),;+~-._[]")
        for number, part in enumerate(parts)
    )
