"""The error tree against the contract's table of codes."""

from http import HTTPStatus

import pytest

from relay import errors
from relay.errors import (
    BrokerError,
    ClientBusy,
    ClientError,
    ClientGone,
    DaemonError,
    MethodNotAllowed,
    RelayError,
)

CONTRACT = {
    "bad-request": 400,
    "bad-multipart": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "too-slow": 408,
    "key-in-use": 409,
    "too-large": 413,
    "unsupported-media-type": 415,
    "expectation-failed": 417,
    "digest-mismatch": 422,
    "headers-too-large": 431,
    "too-many-uploads": 503,
    "not-implemented": 501,
    "http-version": 505,
    "unroutable": 502,
    "broker-refused": 502,
    "broker-unavailable": 503,
    "broker-blocked": 503,
    "confirm-timeout": 504,
    "outcome-unknown": 504,
    "queue-full": 507,
    "shutting-down": 503,
}
WITH_RETRY_AFTER = {"too-many-uploads", "broker-unavailable", "broker-blocked"}
OF_THE_CLIENT = ClientBusy
"""The one error that shares its code, ``too-many-uploads``: as the client's own limit it is 429."""


def descendants(cls: type[RelayError]) -> set[type[RelayError]]:
    children = set(cls.__subclasses__())
    return children.union(*(descendants(child) for child in children))


FAMILIES: set[type[RelayError]] = {ClientError, BrokerError, DaemonError}
ERRORS = descendants(RelayError) - FAMILIES


def made(cls: type[RelayError]) -> RelayError:
    if issubclass(cls, MethodNotAllowed):
        return cls("what happened", allow="POST")
    return cls("what happened")


def test_statuses_and_codes_are_those_of_the_contract() -> None:
    ours = {error.code: error.status for error in ERRORS - {ClientGone, OF_THE_CLIENT}}
    assert ours == CONTRACT
    assert (OF_THE_CLIENT.code, OF_THE_CLIENT.status) == ("too-many-uploads", 429)


def test_who_is_to_come_back_is_told_when() -> None:
    told = {error.code for error in ERRORS if error.retry_after is not None}
    assert told >= WITH_RETRY_AFTER
    # Trying again unchanged would fail again, or is not known to be harmless.
    assert not told & {"too-large", "bad-request", "digest-mismatch", "outcome-unknown"}


def test_every_code_has_one_class() -> None:
    codes = [error.code for error in ERRORS - {OF_THE_CLIENT}]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", sorted(ERRORS, key=str))
def test_every_error_has_a_phrase_a_code_and_what_happened(cls: type[RelayError]) -> None:
    error = made(cls)
    assert (error.detail, str(error)) == ("what happened", "what happened")
    assert HTTPStatus(error.status).phrase
    assert error.code == error.code.lower().strip()
    assert "code" in vars(cls), "an error inherits no code"


@pytest.mark.parametrize("cls", sorted(ERRORS - {ClientGone}, key=str))
def test_an_error_belongs_to_whose_fault_it_is(cls: type[RelayError]) -> None:
    family = [family for family in FAMILIES if issubclass(cls, family)]
    assert len(family) == 1
    if family == [ClientError]:
        # 501 and 505 are the client's, whatever their hundreds say: RFC 9110, section 15.6.
        assert cls.status < 500 or cls.status in {501, 505}
    else:
        assert cls.status >= 500


def test_a_client_that_is_gone_is_nobodys_fault_and_has_the_contracts_reason() -> None:
    assert ClientGone.code == "client-gone"
    assert not issubclass(ClientGone, ClientError | BrokerError | DaemonError)


def test_the_module_holds_the_whole_tree() -> None:
    assert {cls.__module__ for cls in ERRORS | FAMILIES} == {errors.__name__}
