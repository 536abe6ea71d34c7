"""Private RabbitMQ nodes where tests make them: what their absence means."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay.demo.rabbitmq import RabbitMQMissing


@contextmanager
def must_be_installed() -> Iterator[None]:
    """Fails the test if RabbitMQ turns out to be missing in the block.

    Never a skip: without a broker half of what relay promises would go untested, unnoticed.
    """
    try:
        yield
    except RabbitMQMissing as exc:
        pytest.fail(f"{exc}; or run ./dev setup", pytrace=False)
