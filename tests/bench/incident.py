"""Temporary files and memory of Flask and of relay under the same wave of uploads, drawn.

Both services run one after the other as processes of their own, against one private
RabbitMQ node and an exchange that drops everything, so that the broker neither fills nor
slows them. Every 100 ms the bench reads from /proc how much each has in temporary files and
in memory, prints the peaks and draws the picture of the README.
"""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import pika
import trio

from relay.demo.daemon import Daemon
from relay.demo.rabbitmq import RabbitMQNode
from tests.bench.plot import Curve, Panel, draw
from tests.bench.wave import MIB, Tally, Wave, run_wave
from tests.incident.flask_process import FlaskService
from tests.incident.observe import resident_bytes, temporary_bytes, written_bytes

EXCHANGE = "bench.incident"
PICTURE = Path(__file__).with_name("incident.svg")
SAMPLE_SECONDS = 0.1
TAIL_SECONDS = 3
CREATED = 201

# The exchange has no bindings: with `mandatory`, every frame would be returned.
RELAY_CONFIG = f"""
[routes.default]
exchange = "{EXCHANGE}"
mandatory = false
"""

# Okabe and Ito's vermilion and blue: told apart with every kind of colour vision.
FLASK_COLOUR = "#d55e00"
RELAY_COLOUR = "#0072b2"


class Service(Protocol):
    """A process that takes uploads."""

    @property
    def url(self) -> str:
        """Where it listens, without a path."""

    @property
    def pid(self) -> int:
        """Its process."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a service held at one moment; bytes."""

    seconds: float
    temporary: int
    resident: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How one service went through the wave; `written` is in bytes to storage, meanwhile."""

    name: str
    samples: Sequence[Sample]
    statuses: Counter[int]
    written: int

    @property
    def failed(self) -> bool:
        """Tells whether any upload got another answer than 201."""
        return set(self.statuses) != {CREATED}

    def peak(self, quantity: str) -> Sample:
        """Returns the sample in which `temporary` or `resident` was highest."""
        return max(self.samples, key=lambda sample: getattr(sample, quantity))


def measure(name: str, service: Service, directory: Path, wave: Wave) -> Course:
    """Sends the wave to a service while looking at its process.

    Args:
        name: what to call it.
        service: the process.
        directory: its TMPDIR.
        wave: the uploads.
    """
    written = written_bytes(service.pid)
    tally = Tally()
    samples: list[Sample] = []
    trio.run(_wave_with_samples, service, directory, wave, tally, samples)
    return Course(
        name=name,
        samples=samples,
        statuses=Counter(tally.statuses),
        written=written_bytes(service.pid) - written,
    )


async def _wave_with_samples(
    service: Service, directory: Path, wave: Wave, tally: Tally, samples: list[Sample]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_sample, service.pid, directory, samples)
        await run_wave(service.url, wave, tally)
        await trio.sleep(TAIL_SECONDS)
        nursery.cancel_scope.cancel()


async def _sample(pid: int, directory: Path, samples: list[Sample]) -> None:
    start = trio.current_time()
    while True:
        now = trio.current_time() - start
        samples.append(Sample(now, temporary_bytes(pid, directory), resident_bytes(pid)))
        await trio.sleep_until(start + (len(samples) * SAMPLE_SECONDS))


def table(courses: Sequence[Course]) -> str:
    """Returns the figures of each course, MiB, one line each."""
    head = f"{'MiB':<12}{'temporary':>11}{'resident':>10}{'at first':>10}{'to disk':>9}   answers"
    lines = [head]
    for course in courses:
        temporary = course.peak("temporary").temporary / MIB
        resident = course.peak("resident").resident / MIB
        first = course.samples[0].resident / MIB
        answers = ", ".join(f"{status} {count} times" for status, count in course.statuses.items())
        lines.append(
            f"{course.name:<12}{temporary:>11.1f}{resident:>10.1f}{first:>10.1f}"
            f"{course.written / MIB:>9.1f}   {answers}"
        )
    return "\n".join(lines)


def picture(flask: Course, relay: Course, wave: Wave) -> str:
    """Returns the SVG with both courses: temporary files on the left, memory on the right."""
    panels = [
        Panel(
            title="In temporary files",
            unit="MiB",
            curves=[
                _curve(flask, "temporary", FLASK_COLOUR),
                _curve(relay, "temporary", RELAY_COLOUR),
            ],
        ),
        Panel(
            title="In memory (resident)",
            unit="MiB",
            curves=[
                _curve(flask, "resident", FLASK_COLOUR),
                _curve(relay, "resident", RELAY_COLOUR),
            ],
        ),
    ]
    uploads = wave.slots * wave.uploads_per_slot
    subtitle = [
        f"{uploads} uploads, up to {wave.slots} at once, each a file of {_mib(wave.file_bytes)} "
        f"and a plain field of {_mib(wave.field_bytes)}, sent at {_mib(wave.rate)}/s.",
        f"Flask {version('flask')} with its limit on plain fields lifted, as it was before 3.1; "
        "with it, it refuses these uploads (413).",
    ]
    title = "The same wave of uploads through Flask and through relay"
    description = " ".join(
        f"{course.name} held up to {_mib(course.peak('temporary').temporary)} in temporary files "
        f"and {_mib(course.peak('resident').resident)} in memory."
        for course in (flask, relay)
    )
    return draw(title, subtitle, panels, description)


def _curve(course: Course, quantity: str, colour: str) -> Curve:
    points = [(sample.seconds, getattr(sample, quantity) / MIB) for sample in course.samples]
    peak = course.peak(quantity)
    value = getattr(peak, quantity)
    size = f"{_mib(value)} at most" if value else "0 bytes"
    middle = points[len(points) // 2][0]
    return Curve(
        label=f"{course.name}: {size}",
        colour=colour,
        points=points,
        label_at=peak.seconds if value else middle,
    )


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def run_flask(amqp_url: str, wave: Wave) -> Course:
    """Sends the wave through the Flask service."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        service = FlaskService(amqp_url, directory, exchange=EXCHANGE, unlimited_fields=True)
        with service:
            return measure("Flask + pika", service, directory, wave)


def run_relay(amqp_url: str, wave: Wave) -> Course:
    """Sends the wave through relay."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as configuration:
        environment = os.environ | {"TMPDIR": name, "PYTHONDONTWRITEBYTECODE": "1"}
        directory = Path(name)
        daemon = Daemon(
            amqp_url,
            RELAY_CONFIG,
            directory=Path(configuration),
            env=environment,
            cwd=directory,
        )
        with daemon:
            return measure("relay", daemon, directory, wave)


def main(argv: list[str]) -> int:
    """Runs both services and writes the picture.

    Returns:
        0, or 1 if an upload was not answered with 201.
    """
    parser = argparse.ArgumentParser(prog="bench incident", description=__doc__)
    parser.add_argument("--uploads", type=int, default=Wave().slots, help="most uploads at once")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the SVG to write")
    options = parser.parse_args(argv)
    wave = Wave(slots=options.uploads)
    with RabbitMQNode() as node:
        with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
            connection.channel().exchange_declare(EXCHANGE, "fanout", durable=True)
        flask, relay = run_flask(node.url, wave), run_relay(node.url, wave)
    print(table([flask, relay]))
    options.output.write_text(picture(flask, relay, wave))
    print(f"drawn: {options.output}")
    return 1 if flask.failed or relay.failed else 0
