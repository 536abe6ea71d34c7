"""How long to wait before the next attempt, for all that is attempted again. Pure."""


def delay(attempt: int, jitter: float, *, first: float, last: float) -> float:
    """Seconds to wait before attempt number ``attempt`` (0: the first after a failure).

    At most ``first``, doubled with each attempt up to ``last``; ``jitter`` in [0, 1) takes off up
    to half of it, which spreads a fleet that lost its peer at the same moment.
    """
    longest: float = min(last, first * 2.0 ** min(attempt, 16))
    return longest * (0.5 + jitter / 2)
