"""The memory of ``relay receive`` does not depend on the size of what it receives."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from relay.demo.rabbitmq import RabbitMQNode
from relay.model import PartHead, Transfer
from relay.protocol.framing import Framer
from relay.protocol.wire import encode_frame
from relay.receiver.options import PREFETCH
from tests.hostile_messages import Published
from tests.observed_receiver import (
    MIB,
    ObservedReceiver,
    declare,
    memory_bound,
    properties_of,
    publish,
    wait_until,
)
from tests.receiving import QUORUM

FRAME: Final = 131064


def one_part(size: int) -> Iterator[Published]:
    """A transfer of one part of so many zeros."""
    framer = Framer(Transfer(id=str(uuid.uuid4()), began=1, route="default"), frame_size=FRAME)
    list(framer.start_part(PartHead(filename="zeros")))
    piece = bytes(MIB)
    for _ in range(size // MIB):
        for message in map(encode_frame, framer.feed(piece)):
            yield properties_of(message), message.body
    framer.end_part()
    message = encode_frame(framer.finish()[0])
    yield properties_of(message), message.body


def test_512_mib_take_the_memory_of_64_mib(rabbitmq: RabbitMQNode, tmp_path: Path) -> None:
    queue = f"receive-memory-{uuid.uuid4()}"
    declare(rabbitmq.url, queue, QUORUM)
    peaks = []
    with ObservedReceiver(rabbitmq.url, queue, tmp_path / "output") as receiver:
        for number, size in enumerate((64 * MIB, 512 * MIB), 1):
            publish(rabbitmq.url, queue, one_part(size))
            wait_until(lambda number=number: receiver.out.count("\n") == number, f"{size} bytes")  # type: ignore[misc]
            peaks.append(receiver.peak())
    print(f"64 MiB {peaks[0] / MIB:.1f}, 512 MiB {peaks[1] / MIB:.1f} MiB")
    # How full the prefetch was is a matter of luck.
    assert peaks[1] - peaks[0] <= PREFETCH * FRAME
    assert peaks[1] <= memory_bound(FRAME)
