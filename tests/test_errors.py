"""The error tree against the contract's table of codes."""

from http import HTTPStatus

import pytest

from relay import errors
from relay.errors import (
    BrokerError,
    ClientError,
    ClientGone,
    DaemonError,
    MethodNotAllowed,
    RelayError,
)

# Status, code, and whether the answer says when to come back. What nothing raises yet (codes of
# later versions) is listed in NOT_YET.
CONTRACT = {
    ("bad-request", 400, False),
    ("bad-multipart", 400, False),
    ("not-found", 404, False),
    ("method-not-allowed", 405, False),
    ("too-slow", 408, False),
    ("too-large", 413, False),
    ("unsupported-media-type", 415, False),
    ("expectation-failed", 417, False),
    ("digest-mismatch", 422, False),
    ("headers-too-large", 431, False),
    ("too-many-uploads", 503, True),
    ("not-implemented", 501, False),
    ("http-version", 505, False),
    ("unroutable", 502, False),
    ("broker-refused", 502, False),
    ("broker-unavailable", 503, True),
    ("broker-blocked", 503, True),
    ("confirm-timeout", 504, False),
    ("outcome-unknown", 504, False),
    ("queue-full", 507, False),
    ("shutting-down", 503, False),
}
NOT_YET = {"unauthorized", "forbidden", "key-in-use"}


def descendants(cls: type[RelayError]) -> set[type[RelayError]]:
    children = set(cls.__subclasses__())
    return children.union(*(descendants(child) for child in children))


FAMILIES = {ClientError, BrokerError, DaemonError}
ERRORS = descendants(RelayError) - FAMILIES


def made(cls: type[RelayError]) -> RelayError:
    if issubclass(cls, MethodNotAllowed):
        return cls("what happened", allow="POST")
    return cls("what happened")


def test_statuses_and_codes_are_those_of_the_contract() -> None:
    ours = {
        (error.code, error.status, error.retry_after is not None)
        for error in ERRORS - {ClientGone}
    }
    assert ours == CONTRACT
    assert not {code for code, _, _ in CONTRACT} & NOT_YET


def test_every_code_has_one_class() -> None:
    codes = [error.code for error in ERRORS]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", sorted(ERRORS, key=lambda cls: cls.__name__))
def test_every_error_has_a_phrase_a_code_and_what_happened(cls: type[RelayError]) -> None:
    error = made(cls)
    assert (error.detail, str(error)) == ("what happened", "what happened")
    assert HTTPStatus(error.status).phrase
    assert error.code == error.code.lower().strip()
    assert "code" in vars(cls), "an error inherits no code"


@pytest.mark.parametrize("cls", sorted(ERRORS - {ClientGone}, key=lambda cls: cls.__name__))
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
