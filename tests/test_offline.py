"""Nothing leaves the machine: the rule that the whole suite and its children are held to."""

import os
import socket
import subprocess
import sys
import urllib.request

import pytest

ELSEWHERE = "192.0.2.1"  # set aside for documentation; nobody has it


def test_connections_elsewhere_are_refused_and_remembered(refused_hosts):
    with pytest.raises(PermissionError, match=ELSEWHERE):
        socket.create_connection((ELSEWHERE, 80), timeout=1)
    with pytest.raises(PermissionError, match="example.org"):
        socket.getaddrinfo("example.org", 80)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{ELSEWHERE}", timeout=1)
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(PermissionError):
        udp.sendto(b"", (ELSEWHERE, 80))
    assert set(refused_hosts) == {ELSEWHERE, "example.org"}
    refused_hosts.clear()  # or the suite would fail this test, as it should


def test_children_are_held_to_it_too():
    ask = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.returncode == 1 and f"refused a connection to {ELSEWHERE}" in done.stderr


def test_this_machine_may_talk_to_itself():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.getpeername() == server.getsockname()
    ours, theirs = socket.socketpair()
    ours.close(), theirs.close()


def test_the_users_own_cache_is_out_of_reach(tmp_path_factory):
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    from huggingface_hub import constants

    assert constants.HF_HUB_CACHE.startswith(os.environ["HF_HOME"])
    assert constants.HF_HUB_OFFLINE
