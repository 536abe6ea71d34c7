"""relay's units on a real systemd: what they promise to whoever deploys them."""

import re
import shutil
import subprocess
import threading
import time
from http.client import HTTPException
from pathlib import Path

import pytest
import trustme

from relay.server.tokens import line_of
from tests.systemd.lab import Lab
from tests.systemd.machine import CONFIG, ROUTE, UNITS, Machine

SYSTEMD = Path(__file__).parent.parent.parent / "systemd"
MIB = 2**20
INSTALLED = "/usr/local/lib/systemd/system/relay.service"


# --- what systemd itself says of them ------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_units(installed: Lab) -> None:
    # Of a template it would try the instance "i", which is no part of a port.
    names = [path.name.replace("@.", "@1.") for path in sorted(SYSTEMD.glob("relay*.s*"))]
    installed.run("mkdir", "-p", "/run/verify")
    for path in SYSTEMD.glob("relay*.s*"):
        installed.write(f"/run/verify/{path.name.replace('@.', '@1.')}", path.read_text())
    # With the drop-ins as they come, at the places that their first lines name.
    for path in sorted((SYSTEMD / "drop-ins").glob("*.conf")):
        text = path.read_text()
        place = re.match(r"# /etc/systemd/system/(\S+):", text)
        assert place is not None
        installed.write(f"/run/verify/{place[1]}", text)
    verified = installed.run("systemd-analyze", "verify", *(f"/run/verify/{n}" for n in names))
    assert (verified.stdout, verified.stderr) == ("", "")


@pytest.mark.parametrize("unit", ["relay", "relay@1", "relay-receive@uploads"])
def test_the_units_expose_nearly_nothing(unit: str, installed: Lab) -> None:
    report = installed.run("systemd-analyze", "security", "--threshold=12", f"{unit}.service")
    assert "Overall exposure level" in report.stdout


def test_an_instance_is_as_locked_down_as_the_one_service() -> None:
    one = (SYSTEMD / "relay.service").read_text().splitlines()
    instance = (SYSTEMD / "relay@.service").read_text().splitlines()
    different = [line for line in instance if line not in one]
    assert [line.partition("=")[0] for line in different[1:]] == ["Description", "Sockets", "Also"]
    assert len(one) == len(instance)


# --- life and death ------------------------------------------------------------------------------


def test_it_is_started_when_it_can_serve(machine: Machine) -> None:
    assert machine.show("ActiveState") == "active"
    assert machine.page("/readyz") == {"status": "ready"}
    assert machine.upload() == 201
    machine.lab.wait_until(
        lambda: machine.show("StatusText") == "0 uploads, 0.0 MiB/s; broker ready", "it tells"
    )


def test_the_first_connection_starts_it(machine: Machine) -> None:
    machine.run("systemctl", "stop", "relay.service")
    assert machine.show("ActiveState") == "inactive"
    assert machine.upload() == 201
    machine.wait_for("ActiveState", "active")
    assert "listening for uploads" in machine.log()


def test_one_command_has_it_now_and_at_every_boot(machine: Machine) -> None:
    machine.run("systemctl", "stop", *UNITS)
    machine.run("systemctl", "enable", "--now", "relay")
    try:
        for unit in UNITS:
            assert machine.run("systemctl", "is-enabled", unit).stdout == "enabled\n"
            assert machine.show("ActiveState", unit) == "active"
    finally:
        machine.run("systemctl", "disable", *UNITS)


def test_a_large_upload_passes_within_the_memory_that_the_unit_has(machine: Machine) -> None:
    size, piece = 1024 * MIB, bytes(MIB)
    client = machine.client()
    assert client.upload((piece for _ in range(size // MIB)), size) == 201
    client.close()
    assert int(machine.show("MemoryMax")) == 640 * MIB
    pid = machine.show("MainPID")
    status = machine.lab.path(f"/proc/{pid}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    assert int(peak[1]) * 1024 < 100 * MIB
    io = machine.lab.path(f"/proc/{pid}/io").read_text()
    assert "\nwrite_bytes: 0\n" in io
    assert machine.show("NRestarts") == "0"


def test_it_is_started_again_when_it_was_killed_and_nobody_is_refused(machine: Machine) -> None:
    pid = machine.show("MainPID")
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "relay")
    machine.lab.wait_until(lambda: machine.show("MainPID") != pid, "it is gone")
    assert machine.upload() == 201
    assert machine.show("MainPID") not in (pid, "0")


def test_a_loop_that_is_stuck_is_ended_and_started_again(machine: Machine) -> None:
    quick = "[Service]\nWatchdogSec=1s\nTimeoutAbortSec=1s\nRestartSec=100ms\n"
    machine.change("/etc/systemd/system/relay.service.d/test.conf", quick)
    machine.run("systemctl", "restart", "relay")
    pid = machine.show("MainPID")
    machine.run("systemctl", "kill", "--signal=STOP", "--kill-whom=main", "relay")
    machine.lab.wait_until(lambda: machine.show("NRestarts") == "1", "it is restarted", "relay")
    machine.wait_for("ActiveState", "active")
    assert "Watchdog timeout" in machine.log()
    assert machine.show("MainPID") != pid
    assert machine.upload() == 201


class Load:
    """Clients that upload without a break, each on one connection for as long as that lasts."""

    def __init__(self, machine: Machine, clients: int) -> None:
        self.statuses: list[int] = []
        self.failures: list[Exception] = []
        self._over = threading.Event()
        self._machine = machine
        self._threads = [
            threading.Thread(target=self._upload, args=(number % 2 == 0,))
            for number in range(clients)
        ]

    def _upload(self, keeps_alive: bool) -> None:
        client = self._machine.client()
        while not self._over.is_set():
            try:
                self.statuses.append(client.upload(bytes(10_000), 10_000))
            except (OSError, HTTPException) as exc:
                self.failures.append(exc)
                return
            if not keeps_alive:
                client.close()
        client.close()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_restart_under_load_loses_nobody(machine: Machine) -> None:
    slow = machine.client()
    slow.begin(2 * MIB)
    slow.send(bytes(MIB))
    with Load(machine, clients=6) as load:
        machine.lab.wait_until(lambda: len(load.statuses) > 50, "uploads flow")
        for restart in range(2):
            pid = machine.show("MainPID")
            machine.run("systemctl", "restart", "--no-block", "relay")
            if restart == 0:
                machine.wait_for("SubState", "stop-sigterm")
                slow.send(bytes(MIB))
                response = slow.getresponse()
                assert (response.status, response.getheader("Connection")) == (201, "close")
                slow.close()
            machine.lab.wait_until(
                lambda: machine.show("MainPID") not in (pid, "0"),  # noqa: B023
                "another runs",
                "relay",
            )
            machine.wait_for("ActiveState", "active")
            done = len(load.statuses)
            machine.lab.wait_until(lambda: len(load.statuses) > done + 50, "uploads flow")  # noqa: B023
    assert load.failures == []
    assert set(load.statuses) == {201}
    assert machine.show("NRestarts") == "0"


def test_a_reload_touches_no_upload_in_progress(machine: Machine) -> None:
    pid = machine.show("MainPID")
    client = machine.client()
    client.begin(2 * MIB)
    client.send(bytes(MIB))
    machine.wait_until_in_progress()
    for text, status in (("max_upload = 1", "not reloaded: "), ("max_uploads = 9", "1 uploads")):
        machine.change("/etc/relay/relay.toml", CONFIG.replace("[http]", f"[http]\n{text}"))
        machine.run("systemctl", "reload", "relay")
        machine.lab.wait_until(
            lambda: machine.show("StatusText").startswith(status),  # noqa: B023
            f"the status is {status}",
            "relay",
        )
        assert machine.show("ActiveState") == "active"
    client.send(bytes(MIB))
    assert client.getresponse().status == 201
    assert machine.show("MainPID") == pid


def test_what_is_not_done_when_the_drain_is_over_is_told_and_the_end_is_orderly(
    machine: Machine,
) -> None:
    machine.change("/etc/relay/relay.toml", CONFIG.replace("20 s", "1 s"))
    machine.run("systemctl", "restart", "relay")
    client = machine.client()
    client.begin(2 * MIB)
    client.send(bytes(MIB))
    machine.wait_until_in_progress()
    machine.run("systemctl", "stop", "--no-block", "relay.service")
    response = client.getresponse()
    assert response.status == 503
    assert b'"shutting-down"' in response.read()
    client.close()
    machine.wait_for("ActiveState", "inactive")
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    assert "disconnected from the broker" in machine.log()


def test_a_second_signal_hastens_the_end(machine: Machine) -> None:
    client = machine.client()
    client.begin(2 * MIB)
    client.send(bytes(MIB))
    machine.wait_until_in_progress()
    machine.run("systemctl", "stop", "--no-block", "relay.service")
    machine.wait_for("SubState", "stop-sigterm")
    machine.lab.wait_until(lambda: "stopping" in machine.log(), "it drains")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=TERM", "relay")
    assert client.getresponse().status == 503
    client.close()
    machine.wait_for("ActiveState", "inactive")
    assert machine.show("ExecMainStatus") == "0"


# --- what is wrong is said, at once and once -----------------------------------------------------


def test_a_configuration_that_is_wrong_is_named_and_not_tried_again(machine: Machine) -> None:
    machine.run("systemctl", "stop", "relay.service")
    machine.change("/etc/relay/relay.toml", "[http]\nmax_upload = 1\n")
    assert machine.run("systemctl", "start", "relay", check=False).returncode != 0
    assert machine.show("ActiveState") == "failed"
    assert machine.show("ExecMainStatus") == "2"
    assert machine.show("NRestarts") == "0"
    assert "relay: /etc/relay/relay.toml: http.max_upload: unknown key" in machine.log()


def test_a_socket_open_to_the_world_needs_authentication(machine: Machine) -> None:
    machine.run("systemctl", "stop", "relay.socket", "relay.service")
    machine.change(
        "/etc/systemd/system/relay.socket.d/network.conf",
        (SYSTEMD / "drop-ins/network.conf").read_text(),
    )
    machine.run("systemctl", "start", "relay.socket")
    assert machine.run("systemctl", "start", "relay", check=False).returncode != 0
    assert machine.show("ExecMainStatus") == "2"
    assert "http.listen: [::]:8480 is not loopback and uploads are not" in machine.log()


def test_clients_do_not_make_it_try_a_wrong_configuration_for_ever(machine: Machine) -> None:
    machine.run("systemctl", "stop", "relay.service")
    machine.change("/etc/relay/relay.toml", "[http]\nmax_upload = 1\n")
    with pytest.raises((OSError, HTTPException)):
        machine.upload()
    machine.wait_for("Result", "service-start-limit-hit", "relay.socket")
    assert 1 < machine.log().count("unknown key") <= 5  # StartLimitBurst=, the good start included
    machine.change("/etc/relay/relay.toml", CONFIG)
    machine.run("systemctl", "reset-failed")
    machine.run("systemctl", "restart", "relay.socket", "relay")
    assert machine.upload() == 201


def test_certificate_and_tokens_come_from_credentials(machine: Machine) -> None:
    ca = trustme.CA()
    identity = ca.issue_cert("localhost")
    files = {
        "tls-certificate.pem": b"".join(blob.bytes() for blob in identity.cert_chain_pems),
        "tls-key.pem": identity.private_key_pem.bytes(),
        "tokens": line_of("alice", "relay_secret").encode() + b"\n",
        "amqp-password": b"guest\n",
    }
    for name, content in files.items():
        machine.change(f"/etc/relay/{name}", content.decode(), mode=0o600)
    machine.change("/etc/relay/ca.pem", ca.cert_pem.bytes().decode())
    # The lines that the example has for it, without their comment signs.
    example = (SYSTEMD / "relay.toml").read_text()
    secrets = re.sub(
        r"^# ((?:password|certificate|key|tokens)_file|\[)", r"\1", example, flags=re.M
    )
    machine.change("/etc/relay/relay.toml", secrets.replace("[amqp]", ROUTE + "[amqp]", 1))
    machine.change(
        "/etc/systemd/system/relay.service.d/secrets.conf",
        (SYSTEMD / "drop-ins/secrets.conf").read_text(),
    )
    machine.run("systemctl", "restart", "relay")
    curl = ["curl", "-sS", "--cacert", "/etc/relay/ca.pem", "-T", "/etc/hostname"]
    url = "https://localhost:8480/upload/"
    assert '"unauthorized"' in machine.run(*curl, url).stdout
    answer = machine.run(*curl, "-H", "Authorization: Bearer relay_secret", url).stdout
    assert answer.startswith('{"transfer": ')


def test_a_credential_that_is_missing_is_named_and_not_tried_again(machine: Machine) -> None:
    machine.change(
        "/etc/systemd/system/relay.service.d/secrets.conf",
        (SYSTEMD / "drop-ins/secrets.conf").read_text(),
    )
    machine.run("systemctl", "stop", "relay.service")
    assert machine.run("systemctl", "start", "relay", check=False).returncode != 0
    assert machine.show("ActiveState") == "failed"
    assert machine.show("ExecMainStatus") == "243"
    assert machine.show("NRestarts") == "0"
    assert "status=243/CREDENTIALS" in machine.log()


# --- locked down ---------------------------------------------------------------------------------

# What is mounted read-only is so, says the kernel. In /proc there are no files to fill.
PROBE = """
import os, stat
mounts = [line.split() for line in open("/proc/self/mountinfo")]
is_read_only = {mount[4]: "ro" in mount[5].split(",") for mount in mounts}
print("the root is read-only:", is_read_only["/"])
writable = [path for path in is_read_only if not is_read_only[path] and "/proc" not in path]
found = []
for path, directories, files in (step for start in writable for step in os.walk(start)):
    try:
        os.close(os.open(path + "/relay-probe", os.O_CREAT | os.O_WRONLY, 0o600))
        found.append(path)
    except OSError:
        pass
    for name in files:
        file = os.path.join(path, name)
        try:
            if stat.S_ISREG(os.lstat(file).st_mode) and os.access(file, os.W_OK):
                found.append(file)
        except OSError:
            pass
print("writable:", found)
print(next(line for line in open("/proc/self/limits") if "file size" in line))
"""


def test_there_is_nowhere_to_write_in_there(machine: Machine) -> None:
    machine.change("/opt/probe.py", PROBE)
    unit = (SYSTEMD / "relay.service").read_text()
    for key, value in {
        "Type": "Type=oneshot",
        "ExecStart": "ExecStart=/usr/bin/python3 -B /opt/probe.py",
        "Sockets": "",
        "WatchdogSec": "",
    }.items():
        unit, number = re.subn(rf"^{key}=.*$", value, unit, flags=re.MULTILINE)
        assert number == 1
    machine.change("/etc/systemd/system/probe.service", unit)
    machine.run("systemctl", "start", "probe")
    log = machine.log("probe")
    assert "the root is read-only: True" in log
    assert "writable: []" in log
    assert re.search(r"Max file size\s+0\s+0\s+bytes", log)


def test_the_process_is_measured_in_there_too(machine: Machine) -> None:
    client = machine.client(8481)
    client.request("GET", "/metrics")
    metrics = client.getresponse().read().decode()
    readme = (SYSTEMD / "README.md").read_text()
    documented = set(re.findall(r"`(process_[a-z_]+)", readme))
    values = dict(re.findall(r"^(process_[a-z_]+) (\S+)$", metrics, re.MULTILINE))
    assert set(values) == documented
    booted = time.time() - time.monotonic()
    began = int(machine.show("ExecMainStartTimestampMonotonic")) / 1e6 + booted
    # The kernel rounds to hundredths, and systemd takes its time before it forks.
    assert float(values["process_start_time_seconds"]) == pytest.approx(began, abs=5)


# --- other units ---------------------------------------------------------------------------------


def test_instances_share_one_port(machine: Machine) -> None:
    machine.run("systemctl", "stop", "relay.socket", "relay-admin.socket", "relay.service")
    instances = ["relay@1", "relay@2"]
    sockets = [f"relay{admin}@{n}.socket" for n in (1, 2) for admin in ("", "-admin")]
    machine.run("systemctl", "enable", "--now", *instances)

    def served() -> list[int]:
        pages = [machine.page("/status", 8490 + n) for n in (1, 2)]
        return [page["outcomes"].get("committed", 0) for page in pages]

    def both_serve() -> bool:
        assert machine.upload() == 201
        return all(served())

    try:
        machine.lab.wait_until(both_serve, "the kernel has chosen each of them")
        with Load(machine, clients=4) as load:
            machine.lab.wait_until(lambda: len(load.statuses) > 20, "uploads flow")
            machine.run("systemctl", "restart", "relay@1")
            machine.lab.wait_until(lambda: served()[0] > 0, "it serves again", "relay@1")
        assert load.failures == []
        assert set(load.statuses) == {201}
        machine.run("systemctl", "stop", "relay@1.socket", "relay-admin@1.socket", "relay@1")
        assert {machine.upload() for _ in range(10)} == {201}
        assert machine.show("MainPID", "relay@1") == "0"
    finally:
        machine.run("systemctl", "disable", "--now", *instances, *sockets)


def test_the_receiver_has_its_files_where_the_unit_says(machine: Machine) -> None:
    machine.run("systemctl", "start", "relay-receive@lab")
    try:
        assert machine.upload(route="kept") == 201
        received = machine.lab.path("/var/lib/private/relay-receive/lab")
        machine.lab.wait_until(
            lambda: any(received.glob("*/receipt.json")), "it is received", "relay-receive@lab"
        )
        (file,) = received.glob("*/0-file")
        assert file.read_bytes() == bytes(1000)
    finally:
        machine.run("systemctl", "stop", "relay-receive@lab")
    assert machine.show("Result", "relay-receive@lab") == "success"


# --- versions ------------------------------------------------------------------------------------


def test_an_older_version_is_one_command_away(installed: Lab) -> None:
    version = installed.run("/opt/relay/current/bin/relay", "--version").stdout.split()[1]
    older = installed.path("/opt/relay/0.0.1")
    shutil.copytree(installed.path(f"/opt/relay/{version}"), older, symlinks=True)
    unit = older / "systemd/relay.service"
    unit.write_text(unit.read_text() + "# older\n")
    installed.run("/opt/relay/0.0.1/use")
    assert installed.run("readlink", "/opt/relay/current").stdout == "0.0.1\n"
    assert installed.path(INSTALLED).read_text().endswith("# older\n")
    installed.run(f"/opt/relay/{version}/use")
    assert installed.run("readlink", "/opt/relay/current").stdout == f"{version}\n"
    assert not installed.path(INSTALLED).read_text().endswith("# older\n")
    shutil.rmtree(older)


def test_the_package_is_the_same_for_the_same_files(package: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["tar", "-tvzf", package], capture_output=True, text=True, check=True)
    lines = listed.stdout.splitlines()
    assert {line.split()[1] for line in lines} == {"root/root"}
    assert {line.split()[3] for line in lines} == {"1970-01-01"}
    names = [line.split()[5].partition("/")[2] for line in lines]
    assert {"install", "use", "relay.service", "drop-ins/secrets.conf"} <= set(names)
