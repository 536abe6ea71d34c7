"""The memory formula in the code is the README's."""

import math

from relay.config import AmqpConfig, Config, HttpConfig, RouteConfig
from relay.memory import ceiling, resident

MIB = 1 << 20
DEFAULTS = 494 * MIB
"""What the README says."""


def test_with_the_defaults_it_is_what_the_readme_says() -> None:
    assert math.ceil(ceiling(Config()) / MIB) == DEFAULTS / MIB


def test_each_limit_has_its_price() -> None:
    def more(config: Config) -> float:
        return (ceiling(config) - ceiling(Config())) / 1024

    assert more(Config(http=HttpConfig(max_uploads=257))) * 1024 == (356 * 1024 + 2 * 131064)
    assert more(Config(http=HttpConfig(max_connections=1025))) == 64
    assert more(Config(amqp=AmqpConfig(window=65 * MIB))) == 2048
    large = {"default": RouteConfig(name="default", frame_size=131064 + 1024)}
    assert more(Config(routes=large)) == 256 * 2


def test_this_process_takes_some() -> None:
    assert 10 * MIB < resident() < 2000 * MIB
