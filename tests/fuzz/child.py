"""One target under atheris: ``python -m tests.fuzz.child TARGET LIBFUZZER-OPTIONS``."""

import logging
import sys

import atheris


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    # What is imported in here can be seen by the fuzzer, branch by branch.
    with atheris.instrument_imports(include=["relay", "h11", "multipart", "http_sf"]):
        from tests.fuzz.targets import TARGETS
    logging.disable()
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
