"""A receiver that is killed at any moment loses nothing, and delivers nothing twice or in part.

The long version, with any seed, is `./dev bench kills`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from relay.demo.rabbitmq import RabbitMQNode
from tests.kill_receiver import Rig, judge, torture
from tests.mixed_transfers import MIB, Mix, Planned, make_mix

KILLS = 15
SIZE = 60 * MIB
LARGEST = 16 * MIB
SEED = 6


def test_killed_again_and_again_each_transfer_is_there_once_and_whole(
    rabbitmq: RabbitMQNode, tmp_path: Path
) -> None:
    mix = make_mix(SEED, SIZE, largest=LARGEST)
    rig = Rig(rabbitmq, "receive-kills", tmp_path / "output", mix, Random(SEED))

    outcome = torture(rig, "quorum", KILLS)

    assert not outcome.violations
    assert outcome.kills == KILLS


# --- the judge itself ---------------------------------------------------------------------------


def small_mix() -> Mix:
    return make_mix(SEED, 8 * MIB, largest=MIB)


def deliver(mix: Mix, plan: Planned, output: Path) -> Path:
    """As a receiver would; returns the directory."""
    directory = output / plan.transfer.id
    directory.mkdir()
    (directory / "receipt.json").write_text(json.dumps({"transfer": plan.transfer.id}))
    for number, part in enumerate(plan.parts):
        body = mix.block[part.start : part.start + part.size]
        (directory / f"{number}-{part.filename}").write_bytes(body)
    return directory


def lose(_mix: Mix, transfer: Path) -> None:
    shutil.rmtree(transfer)


def lose_a_part(_mix: Mix, transfer: Path) -> None:
    next(transfer.glob("0-*")).unlink()


def change_a_byte(_mix: Mix, transfer: Path) -> None:
    part = next(transfer.glob("0-*"))
    part.write_bytes(bytes((part.read_bytes()[0] ^ 1,)) + part.read_bytes()[1:])


def add_a_part(_mix: Mix, transfer: Path) -> None:
    (transfer / "99-more").touch()


def add_a_file(_mix: Mix, transfer: Path) -> None:
    (transfer / "more").touch()


def add_to_the_output(_mix: Mix, transfer: Path) -> None:
    (transfer.parent / "more").touch()


def deliver_what_was_given_up(mix: Mix, transfer: Path) -> None:
    deliver(mix, next(p for p in mix.plans if p.abort_after is not None), transfer.parent)


def deliver_twice(mix: Mix, transfer: Path) -> None:
    deliver(mix, next(group[1] for group in mix.groups if len(group) > 1), transfer.parent)


def leave_a_staged_file(_mix: Mix, transfer: Path) -> None:
    (transfer.parent / ".relay-staging" / f"{transfer.name}.journal").touch()


def leave_a_staged_directory(mix: Mix, transfer: Path) -> None:
    (transfer.parent / ".relay-staging" / mix.plans[-1].transfer.id).mkdir()


def leave_a_strange_file(_mix: Mix, transfer: Path) -> None:
    (transfer.parent / ".relay-staging" / "strange").touch()


BREAKAGES = (
    *(lose, lose_a_part, change_a_byte, add_a_part, add_a_file, add_to_the_output),
    *(deliver_what_was_given_up, deliver_twice),
    *(leave_a_staged_file, leave_a_staged_directory, leave_a_strange_file),
)


@pytest.fixture
def transfer(tmp_path: Path) -> Path:
    """One of the transfers in an output that is as it must be; its first part is not empty."""
    mix = small_mix()
    (tmp_path / ".relay-staging").mkdir()
    (tmp_path / ".relay-staging" / "ledger").touch()
    for group in mix.groups:
        deliver(mix, group[0], tmp_path)
    return next(tmp_path / of[0].transfer.id for of in mix.groups if of[0].parts[0].size)


def test_the_judge_has_nothing_against_what_was_sent(transfer: Path) -> None:
    assert judge(small_mix(), transfer.parent) == []


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_judge_sees_whatever_is_wrong(
    transfer: Path, breakage: Callable[[Mix, Path], None]
) -> None:
    breakage(small_mix(), transfer)
    assert judge(small_mix(), transfer.parent)
