"""A queue that stands still while the rest of its broker goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from relay.demo.rabbitmq import RabbitMQNode


@contextmanager
def standing_still(node: RabbitMQNode, queue: str) -> Iterator[None]:
    """The queue takes and confirms nothing for the block's length; its broker talks as ever."""
    lookup = f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>))'
    node.ctl("eval", f"{lookup}, sys:suspend(amqqueue:get_pid(Q)).")
    try:
        yield
    finally:
        node.ctl("eval", f"{lookup}, sys:resume(amqqueue:get_pid(Q)).")
