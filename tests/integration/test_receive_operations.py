"""``relay receive`` as a process, seen by those who operate it."""

import json
import os
import signal
import socket
from pathlib import Path
from random import Random

import pytest

from tests.notify_socket import Manager
from tests.receiver_admin import admin_url, ready, scrape
from tests.receiving import FRAME, MakeQueue, Start, check, cut, eventually

BODY = Random(11).randbytes(3 * FRAME)


def test_metrics_move_with_what_is_received_and_rejected(
    make_queue: MakeQueue, start: Start
) -> None:
    queue = make_queue()
    url = admin_url(receiver := start(queue.name, "--admin", "127.0.0.1:0"))
    eventually(lambda: ready(url)[0] == 200, "it consumes")
    good, gap, half = cut(("good", BODY)), cut(("gap", BODY)), cut(("half", BODY))
    queue.publish_frames([*good, *half[:-1], gap[0], *gap[2:]])
    eventually(lambda: scrape(url).get("relay_receive_rejected_total{gap}", 0) >= 1, "the gap")
    found = scrape(url)
    assert found["relay_receive_transfers_total"] == 1
    # The gap's other frames come after it or with it.
    eventually(lambda: scrape(url)["relay_receive_frames_total"] == 3 + 2 + 2, "all frames")
    found = scrape(url)
    fed = (*good, *half[:-1], gap[0], gap[2])
    assert found["relay_receive_bytes_total"] == sum(len(frame.body) for frame in fed)
    assert found["relay_receive_problems_total{gap}"] == 1
    assert found["relay_receive_open_transfers"] == 1
    assert found["relay_receive_settle_seconds_count"] >= 1
    assert found["relay_receive_last_delivery_timestamp_seconds"] > 1.7e9
    assert found["relay_receive_reconnects_total"] == 0
    assert found["relay_receive_up"] == 1
    eventually(lambda: scrape(url)["relay_receive_unsettled"] == 0, "all is settled")
    assert receiver.stop(signal.SIGTERM) == 0


def test_without_a_broker_it_is_not_ready_and_says_why(start: Start) -> None:
    url = admin_url(start("x", "--admin", "127.0.0.1:0", url="amqp://127.0.0.1:1/"))
    eventually(lambda: "127.0.0.1:1" in ready(url)[1], "the reason")
    status, body = ready(url)
    assert status == 503
    assert json.loads(body)["status"] == "not consuming"
    eventually(lambda: scrape(url)["relay_receive_reconnects_total"] >= 2, "reconnects")
    assert scrape(url)["relay_receive_up"] == 0


def test_an_admin_address_in_use_fails_with_one_clear_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        receiver = start("x", "--admin", address)
        assert receiver.wait() == 1
    assert receiver.err == (f"relay receive: cannot listen on {address}: Address already in use\n")


def test_systemd_hears_how_it_goes(
    make_queue: MakeQueue, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(f"{tmp_path}/notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    queue = make_queue()
    queue.publish_frames(cut(("x", BODY)))
    receiver = start(queue.name)
    heard: list[list[str]] = []

    def hears(text: str) -> bool:
        heard.extend(manager.heard())
        return any(line.startswith(text) for lines in heard for line in lines)

    eventually(lambda: hears("STATUS=1 transfers delivered, 0 open, "), "its status")
    assert heard[0] == ["READY=1"]
    assert all(lines[1] == "WATCHDOG=1" for lines in heard[1:])
    assert receiver.stop(signal.SIGTERM) == 0
    assert hears("STOPPING=1")
    manager.close()


def test_programs_read_what_was_delivered_as_json(
    make_queue: MakeQueue, start: Start, output: Path
) -> None:
    queue = make_queue()
    frames = cut(("x", BODY), ("y", b""))
    queue.publish_frames(frames)
    receiver = start(queue.name, "--count", "1", "--json")
    assert receiver.wait() == 0
    (line,) = receiver.out.splitlines()
    told = json.loads(line)
    assert told["transfer"] == frames[0].transfer.id
    assert (told["parts"], told["bytes"]) == (2, len(BODY))
    assert os.path.samefile(told["where"], output / frames[0].transfer.id)
    check(output, frames, ("0-x", BODY), ("1-y", b""))
