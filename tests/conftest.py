"""What all tests share: hypothesis without clock or chance, and RabbitMQ nodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings

from relay.demo.rabbitmq import RabbitMQNode
from tests.private_node import must_be_installed

# Both a deadline and the "too slow" check would fail on a busy machine alone.
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQNode]:
    """The session's RabbitMQ node, started by the first test that asks for it.

    All tests share it: leave it as it was found, and break a ``new_node`` instead.
    """
    with _private_node() as node:
        yield node


@pytest.fixture
def new_node() -> Iterator[Callable[..., RabbitMQNode]]:
    """Makes nodes of the test's own, running, to do with as it likes; arguments as RabbitMQNode."""
    with ExitStack() as stack:

        def make(
            config: Mapping[str, str] | None = None, plugins: Sequence[str] = ()
        ) -> RabbitMQNode:
            return stack.enter_context(_private_node(config, plugins))

        yield make


def _private_node(
    config: Mapping[str, str] | None = None, plugins: Sequence[str] = ()
) -> RabbitMQNode:
    with must_be_installed():
        return RabbitMQNode(config=config, plugins=plugins)
