"""`launch hostfile` over two machines that share nothing but a network: two namespaces at a bridge (a minute)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"house-a": "10.213.77.1", "house-b": "10.213.77.2"}
BRIDGE = "house-br"


def ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


@pytest.fixture
def two_networks() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    if not ip("link", "add", BRIDGE, "type", "bridge", check=False):
        pytest.skip("no right to make a bridge here")
    try:
        ip("link", "set", BRIDGE, "up")
        for number, (host, address) in enumerate(HOSTS.items()):
            ip("netns", "add", host)
            ip("link", "add", f"house{number}", "type", "veth", "peer", "name", "eth7", "netns", host)
            ip("link", "set", f"house{number}", "master", BRIDGE, "up")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth7")
            ip("-n", host, "link", "set", "eth7", "up")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "delete", host, check=False)
        ip("link", "delete", BRIDGE, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("two_networks")
def test_ranks_of_two_hosts_meet_over_the_interface_that_leads_to_the_first(tmp_path: Path) -> None:
    """Their host name leads to the loopback in each, as many distributions set it up."""
    ssh = tmp_path / "ssh"
    # As ssh does: another host, its own name, and the command given to a shell.
    ssh.write_text('#!/bin/bash\nexec nsenter --net=/run/netns/$1 unshare --uts bash -c "hostname $1; $2"\n')
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["launch", "hostfile", "--hostfile", str(tmp_path / "hosts"), "--ssh", str(ssh), "--max-restarts", "0"]
    words += ["--master-addr", HOSTS["house-a"], "doctor", "--distributed", "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode in (0, 1), ended.stderr[-3000:]
    ranks = json.loads(ended.stdout[ended.stdout.index("{") :])["ranks"]
    assert [(one["rank"], one["node"]) for one in ranks] == [(0, "house-a"), (1, "house-b")]
    assert [one["interface"] for one in ranks] == ["eth7", "eth7"], "named, for their host names lead to the loopback"
    assert all(one["between"] > 0 and one["inside"] is None for one in ranks)
