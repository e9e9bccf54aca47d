"""Tasks of one run ask a host together no more than one would, and read its robots.txt once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.preparation.fetching import robots, shared
from data_pipeline.preparation.fetching.robots import Robots
from data_pipeline.preparation.fetching.shared import NoLocksError, SharedHosts
from data_pipeline.preparation.packing.parts import finish_parts

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
HOLDER = """
import sys
from pathlib import Path
from data_pipeline.preparation.fetching.shared import SharedHosts
hosts = SharedHosts(Path(sys.argv[1]), 2, "t")
assert [hosts.take("a.org") is not None for _ in range(3)] == [True, True, False]
print("held", flush=True)
sys.stdin.read()
"""
TASK = """
import sys
from pathlib import Path
from data_pipeline.executors.units import Part
from data_pipeline.preparation import WebRules, fetch
if __name__ == "__main__":
    web = WebRules(private_networks=("127.0.0.1/32",), per_host=2, backoff=0.01)
    for number in sys.argv[3:]:
        fetch(sys.argv[1], Path(sys.argv[2]), web=web, rows_per_shard=4, part=Part(int(number), 5), workers=1)
"""


def test_a_dead_tasks_turns_are_free_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "hosts")]
    holder = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    hosts = SharedHosts(tmp_path / "hosts", 2, "t")
    assert hosts.take("a.org") is None and hosts.take("b.org") is not None
    holder.kill()
    holder.wait(timeout=60)
    first, second = hosts.take("a.org"), hosts.take("a.org")
    assert first is not None and second is not None and hosts.take("a.org") is None
    hosts.give(first)
    assert hosts.take("a.org") == first


def test_what_a_server_answered_is_known_to_all_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, third = (SharedHosts(tmp_path, 2, token) for token in ("bot", "bot", "third"))
    rules = Robots((("/a*", False), ("/a/b", True)))
    for origin, said in (
        ("http://a.org", rules),
        ("http://b.org", robots.EVERYTHING),
        ("http://c.org", robots.NOTHING),
    ):
        assert other.robots(origin) is None
        one.keep_robots(origin, said)
        assert other.robots(origin) == said and third.robots(origin) is None
    assert other.robots("http://c.org") is robots.NOTHING  # which has a reason of its own
    with open(next(path for path in tmp_path.rglob("*.jsonl") if "a.org" in path.read_text()), "a") as file:
        file.write('{"origin": "http://a.org", "tok')  # of a task that was killed while it wrote
    one.keep_robots("http://a.org", robots.EVERYTHING)
    assert other.robots("http://a.org") == robots.EVERYTHING
    monkeypatch.setattr(shared.time, "time", lambda: 4e9)
    assert other.robots("http://a.org") is None


def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(shared.fcntl, "lockf", refuse)
    with pytest.raises(NoLocksError):
        SharedHosts(tmp_path, 2, "t")


def test_tasks_at_a_time_ask_a_host_no_more_than_one_may(site, tmp_path: Path) -> None:
    table, output = tmp_path / "urls.txt", tmp_path / "set"
    table.write_text("".join(f"{site.url(f'/ok/{n}')}\n" for n in range(100)))
    parts = (["0"], ["1", "2"], ["3", "4"])
    tasks = [
        subprocess.Popen([sys.executable, "-c", TASK, str(table), str(output), *mine], env=ENVIRONMENT)
        for mine in parts
    ]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0, 0]
    assert site.most == 2
    assert site.asked["/robots.txt"] <= len(parts)  # tasks that begin in one moment may each ask; later parts do not
    assert finish_parts(output).samples == 100 and not (output / ".hosts").exists()
