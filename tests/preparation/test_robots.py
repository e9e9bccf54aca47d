"""robots.txt by the examples of RFC 9309, opt-out headers, Retry-After, and which addresses are public."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from multidict import CIMultiDict

from data_pipeline.preparation.fetching.addresses import AddressRule
from data_pipeline.preparation.fetching.robots import opted_out, parse_robots, retry_after

# RFC 9309, section 5.1 and 5.2
SIMPLE = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""
LONGEST = "User-Agent: foobot\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"


@pytest.mark.parametrize(
    ("token", "path", "allowed"),
    [
        ("anybot", "/a.gif", False),
        ("anybot", "/a.gif?x", True),
        ("anybot", "/example/x", False),
        ("anybot", "/publications/x", True),
        ("anybot", "/", True),
        ("FooBot", "/x", False),
        ("foobot", "/example/page.html", True),
        ("foobot", "/example/allowed.gif", True),
        ("barbot", "/example/page.html", False),
        ("bazbot", "/example/page.html", False),
        ("bazbot", "/example/other.gif", True),
        ("quxbot", "/example/", True),
        ("foobot", "/robots.txt", True),
    ],
)
def test_the_rfcs_simple_example(token: str, path: str, allowed: bool) -> None:
    assert parse_robots(SIMPLE, token).allows(path) is allowed


def test_the_longest_match_decides_and_allow_wins_a_tie() -> None:
    rules = parse_robots(LONGEST, "foobot")
    assert rules.allows("/example/page/x") and not rules.allows("/example/page/disallowed.gif")
    assert parse_robots("User-agent: *\nDisallow: /a\nAllow: /a\n", "x").allows("/a")


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [
        # RFC 9309, section 2.2.2
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz", True),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar", False),
        ("/foo/bar/\u30c4", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        # section 2.2.3
        ("/allow/*/disallow", "/allow/x/y/disallow", True),
        ("/this/path/exactly$", "/this/path/exactly", True),
        ("/this/path/exactly$", "/this/path/exactly/", False),
        ("/*.php$", "/a.php", True),
        ("/*.php$", "/a.php5", False),
        ("/a*b*c$", "/abbc", True),
        ("/a*bc$", "/abcbc", True),
        ("*", "/x", True),
    ],
)
def test_patterns(rule: str, path: str, matches: bool) -> None:
    assert parse_robots(f"user-agent: *\ndisallow: {rule}  # a comment\n", "x").allows(path) is not matches


def test_groups_of_one_agent_are_joined_and_nonsense_is_passed_over() -> None:
    text = (
        "\ufeffUser-agent: a\nDisallow: /1\nSitemap: x\nCrawl-delay: 3\nUser-agent: b\nDisallow: /2\n<html>\n"
        "User-agent: A\nDisallow: /3"
    )
    rules = parse_robots(text, "a")
    assert [rules.allows(path) for path in ("/1", "/2", "/3")] == [False, True, False]
    assert parse_robots("", "a").allows("/") and parse_robots("disallow: /", "a").allows("/")


@pytest.mark.parametrize(
    ("values", "out"),
    [
        (["noai"], True),
        (["noindex, NoImageAI"], True),
        (["noindex"], False),
        (["otherbot: noai"], False),
        (["OurBot: noimageai"], True),
        (["otherbot: noindex", "noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], True),
        ([], False),
    ],
)
def test_x_robots_tag(values: list[str], out: bool) -> None:
    headers = CIMultiDict([("x-robots-tag", value) for value in values])
    assert opted_out(headers, "ourbot") is out


def test_tdm_reservation() -> None:
    assert opted_out(CIMultiDict({"tdm-reservation": "1"}), "x") and not opted_out(
        CIMultiDict({"tdm-reservation": "0"}), "x"
    )


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 < retry_after({"Retry-After": soon}) <= 90
    assert retry_after({"Retry-After": "7"}) == 7
    past = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    assert [retry_after({"Retry-After": value}) for value in ("", "soon", past, "-3")] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "2001:db8::1",
        "nonsense",
    ],
)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not AddressRule().allows(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert AddressRule().allows(address)


def test_named_networks_are_allowed_and_nothing_beside_them() -> None:
    rule = AddressRule(["10.1.0.0/16", "fd00::/8", "192.168.7.7"])
    assert all(rule.allows(address) for address in ("10.1.255.1", "fd12::1", "192.168.7.7"))
    assert not any(rule.allows(address) for address in ("10.2.0.1", "192.168.7.8", "fe80::1"))
