"""Who a request is from: tokens, certificates, users of Unix sockets, and nobody."""

from typing import Any

import pytest

from relay.config import RouteConfig
from relay.errors import Forbidden, Unauthorized
from relay.server.identity import Access, Peer, name_in
from relay.server.tokens import Tokens, line_of
from relay.values import CLIENT_MAX

TOKEN = "relay_secret"
TOKENS = Tokens(line_of("alice", TOKEN))
BEARER = f"Bearer {TOKEN}".encode()
STRANGER = Peer(address="192.0.2.1:5000")
KNOWN = Peer(address="192.0.2.1:5000", client="carol")
ANYBODY = RouteConfig(name="anybody")
ALICES = RouteConfig(name="alices", clients=("alice", "zoe"))


def challenge(access: Access, authorization: bytes | None, peer: Peer = STRANGER) -> str:
    """What a request is refused with."""
    with pytest.raises(Unauthorized) as caught:
        access.identify(authorization, peer)
    assert "secret" not in caught.value.detail
    return caught.value.challenge


# --- which name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, BEARER, b"Basic eDp5"])
def test_without_any_authentication_everybody_is_nobody_and_may_upload(
    authorization: bytes | None,
) -> None:
    """Authorization is then somebody else's: a proxy's, perhaps."""
    assert Access().identify(authorization, STRANGER) is None


def test_a_token_says_who_it_is() -> None:
    access = Access(tokens=TOKENS, anonymous=False)
    for authorization in (BEARER, b"bearer   " + TOKEN.encode(), b"BEARER " + TOKEN.encode()):
        assert access.identify(authorization, STRANGER) == "alice"


def test_a_token_counts_for_more_than_the_connection() -> None:
    for anonymous in (True, False):
        assert Access(tokens=TOKENS, anonymous=anonymous).identify(BEARER, KNOWN) == "alice"


def test_the_connection_counts_where_no_token_is_sent() -> None:
    for tokens in (None, TOKENS):
        for anonymous in (True, False):
            assert Access(tokens=tokens, anonymous=anonymous).identify(None, KNOWN) == "carol"


@pytest.mark.parametrize("anonymous", [True, False])
@pytest.mark.parametrize("peer", [STRANGER, KNOWN])
def test_a_wrong_token_is_refused_whatever_else_there_is(anonymous: bool, peer: Peer) -> None:
    access = Access(tokens=TOKENS, anonymous=anonymous)
    for wrong in (b"Bearer relay_secre", b"Bearer relay_secret2", b"Bearer ===", b"Bearer alice"):
        assert challenge(access, wrong, peer).startswith('Bearer realm="relay"')
    assert challenge(access, b"Bearer x", peer) == 'Bearer realm="relay", error="invalid_token"'


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer\t" + TOKEN.encode(),
        BEARER + b",",
        BEARER + b" x",
        b"Bearer " + TOKEN.encode() + b'"',
        b"Bearer \xc3\xa4",
        b"Basic " + TOKEN.encode(),
        TOKEN.encode(),
        b"Token " + TOKEN.encode(),
        b"XBearer " + TOKEN.encode(),
    ],
)
def test_what_is_no_bearer_token_is_refused_and_not_taken_for_nothing(other: bytes) -> None:
    assert challenge(Access(tokens=TOKENS, anonymous=True), other) == 'Bearer realm="relay"'


def test_no_token_at_all_is_an_invitation_to_send_one() -> None:
    """RFC 6750, section 3.1: no error code, for there is no error yet."""
    assert challenge(Access(tokens=TOKENS, anonymous=False), None) == 'Bearer realm="relay"'


def test_with_anonymous_clients_those_without_a_token_are_nobody() -> None:
    assert Access(tokens=TOKENS, anonymous=True).identify(None, STRANGER) is None


def test_a_certificate_that_names_nobody_is_forbidden_and_no_token_is_asked_for() -> None:
    with pytest.raises(Forbidden):
        Access(anonymous=False).identify(None, STRANGER)


def test_tokens_can_be_exchanged() -> None:
    access = Access(tokens=TOKENS, anonymous=False)
    access.tokens = Tokens(line_of("alice", "relay_new"))
    challenge(access, BEARER)
    assert access.identify(b"Bearer relay_new", STRANGER) == "alice"


# --- which route --------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [None, "alice", "bob"])
def test_a_route_without_clients_is_for_all(client: str | None) -> None:
    Access(tokens=TOKENS).check(client, ANYBODY)


def test_a_route_with_clients_is_for_them() -> None:
    access = Access(tokens=TOKENS)
    access.check("alice", ALICES)
    for client in ("bob", "Alice", "alice ", ""):
        with pytest.raises(Forbidden):
            access.check(client, ALICES)


def test_who_is_nobody_may_say_who_it_is_if_there_is_a_way_to() -> None:
    with pytest.raises(Unauthorized):
        Access(tokens=TOKENS, anonymous=True).check(None, ALICES)
    with pytest.raises(Forbidden):
        Access().check(None, ALICES)


# --- names in certificates ----------------------------------------------------------------------


def certificate(*names: tuple[str, str], subject: str | None = None) -> dict[str, Any]:
    """As ssl returns it."""
    made: dict[str, Any] = {"subjectAltName": names} if names else {}
    if subject is not None:
        made["subject"] = ((("countryName", "CH"),), (("commonName", subject),))
    return made


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (certificate(("DNS", "a.example"), ("DNS", "b.example"), subject="cn"), "a.example"),
        (certificate(("email", "a@example"), ("DNS", "a.example")), "a.example"),
        (certificate(("DNS", "a.example"), ("URI", "spiffe://x/y")), "spiffe://x/y"),
        (certificate(("email", "a@example"), subject="cn"), "a@example"),
        (certificate(("IP Address", "192.0.2.1"), subject="Zoë O."), "Zoë O."),
        (certificate(subject="x" * CLIENT_MAX), "x" * CLIENT_MAX),
    ],
)
def test_the_first_name_of_the_best_kind_is_the_clients(given: dict[str, Any], name: str) -> None:
    assert name_in(given) == name


@pytest.mark.parametrize(
    "given",
    [
        None,
        {},
        certificate(("IP Address", "192.0.2.1")),
        certificate(subject=""),
        certificate(subject="x" * (CLIENT_MAX + 1)),
        certificate(subject="a\nlevel=error"),
        certificate(subject="a\0b"),
        certificate(subject="a\u202eb"),
        certificate(subject=" a"),
    ],
)
def test_what_cannot_be_a_name_is_none(given: dict[str, Any] | None) -> None:
    assert name_in(given) is None


def test_a_name_is_never_replaced_by_one_that_counts_for_less() -> None:
    """Whoever may choose the first must not get another's by making it too long."""
    given = certificate(("URI", "x" * (CLIENT_MAX + 1)), ("DNS", "alice"), subject="alice")
    assert name_in(given) is None


# --- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "certificates", "who"),
    [
        (Access(), False, "anybody who can connect"),
        (
            Access(tokens=TOKENS, anonymous=False),
            False,
            "bearers of a token (1 client)",
        ),
        (
            Access(tokens=Tokens(), anonymous=False),
            True,
            "bearers of a token (0 clients), holders of a client certificate,"
            " users on Unix sockets",
        ),
        (
            Access(tokens=TOKENS, anonymous=True),
            False,
            "bearers of a token (1 client), anonymous clients",
        ),
    ],
)
def test_who_may_upload_in_words(access: Access, certificates: bool, who: str) -> None:
    assert access.describe(certificates=certificates, unix_sockets=certificates) == who
