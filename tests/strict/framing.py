"""Where bodies end, by section of RFC 9112 and by published ways of smuggling a request.

A row with a CVE is the request that got through that server. SMUGGLED stands behind requests that
another reading would end before it; it must be content, or must not be answered.
"""

from tests.strict.cases import CHUNKED, HELLO, LENGTH, Case, Table, head, refused, taken

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: relay.test\r\n\r\n"
NOT_IMPLEMENTED = "501 not-implemented"
TOO_LARGE = "431 headers-too-large"


def length(value: bytes, body: bytes = b"hello") -> bytes:
    """A request with that Content-Length."""
    return head(b"Content-Length: " + value) + body


def coding(*fields: bytes) -> bytes:
    """A request of those fields with a chunked body, whether or not they say so."""
    return head(*fields) + HELLO


def chunks(body: bytes) -> bytes:
    """A chunked request with that body as it is."""
    return head(CHUNKED) + body


def size(value: bytes) -> bytes:
    """A chunked request whose first chunk has that size line, its line break included."""
    return chunks(value + b"hello\r\n0\r\n\r\n")


def end(value: bytes) -> bytes:
    """A chunked request that has that after its data."""
    return chunks(b"5\r\nhello\r\n" + value)


FRAMING: Table = {
    "RFC 9112, 6.2 and RFC 9110, 8.6: Content-Length": {
        "a body": taken(length(b"5")),
        "none": taken(head(), b""),
        "0": taken(length(b"0", b""), b""),
        "leading zeros": taken(length(b"0005")),
        "a request as content": taken(length(b"%d" % len(SMUGGLED), SMUGGLED), SMUGGLED),
        "chunks as content": taken(length(b"%d" % len(HELLO), HELLO), HELLO),
        "empty": refused(length(b"")),
        "sign": refused(length(b"+5")),
        "negative (CVE-2026-53540, python-multipart)": refused(length(b"-5")),
        "hexadecimal": refused(length(b"0x5")),
        "underscore": refused(length(b"0_5")),
        "fraction": refused(length(b"5.0")),
        "exponent": refused(length(b"5e0")),
        "white space": refused(length(b"5 5")),
        "superscript": refused(length(b"\xb2")),
        "full width (CVE-2025-69224, aiohttp)": refused(length("\uff15".encode())),
        "no-break space": refused(length(b"\xa05")),
        "quoted": refused(length(b'"5"')),
        "parameter": refused(length(b"5;x")),
        "list of equal ones": refused(length(b"5, 5")),
        "list of different ones": refused(length(b"5, 6")),
        "list with an empty one": refused(length(b"5,")),
        "twice": refused(head(LENGTH, LENGTH) + b"hello"),
        "twice and different": refused(head(LENGTH, b"Content-Length: 0") + b"hello"),
        "twice in different case": refused(head(LENGTH, b"CONTENT-LENGTH: 0") + b"hello"),
        "2 to the 63": refused(length(b"9223372036854775808")),
        "2 to the 64 and 5": refused(length(b"18446744073709551621")),
        "5 after 4,000 zeros": refused(length(b"0" * 4000 + b"5")),
        "5,000 digits": refused(length(b"1" * 5000)),
        "folded": refused(head(b"Content-Length:\r\n 5") + b"hello"),
        "space before the colon": refused(head(b"Content-Length : 5") + b"hello"),
        "space before the name (CVE-2024-27982, Node.js)": refused(
            head(b"X: y", b" Content-Length: 5") + b"hello"
        ),
        "twice, one without a colon (CVE-2019-20444 and 20445, Netty)": refused(
            head(b"Content-Length: 5", b"Content-Length:\r\n6") + b"hello"
        ),
    },
    "RFC 9112, 6.1: Transfer-Encoding": {
        "chunked": taken(coding(CHUNKED)),
        "case": taken(coding(b"tRANSFER-eNCODING: cHUNKED")),
        "tab before it": taken(coding(b"Transfer-Encoding:\tchunked")),
        "white space behind it": taken(coding(b"Transfer-Encoding: chunked \t")),
        "another before it": refused(coding(b"Transfer-Encoding: gzip, chunked"), NOT_IMPLEMENTED),
        "another only": refused(coding(b"Transfer-Encoding: gzip"), NOT_IMPLEMENTED),
        "identity": refused(coding(b"Transfer-Encoding: identity"), NOT_IMPLEMENTED),
        "unknown": refused(coding(b"Transfer-Encoding: xchunked"), NOT_IMPLEMENTED),
        "another in the first field": refused(
            coding(b"Transfer-Encoding: x", CHUNKED), NOT_IMPLEMENTED
        ),
        "not last": refused(coding(b"Transfer-Encoding: chunked, gzip")),
        "another in the second field (CVE-2024-1135, Gunicorn)": refused(
            coding(CHUNKED, b"Transfer-Encoding: identity")
        ),
        "twice in a list": refused(coding(b"Transfer-Encoding: chunked, chunked")),
        "twice": refused(coding(CHUNKED, CHUNKED)),
        "empty": refused(coding(b"Transfer-Encoding:")),
        "empty members": refused(coding(b"Transfer-Encoding: ,chunked,")),
        "parameter (7.1)": refused(coding(b"Transfer-Encoding: chunked;q=1")),
        "quoted": refused(coding(b'Transfer-Encoding: "chunked"')),
        "white space in it": refused(coding(b"Transfer-Encoding: chun ked")),
        "vertical tab before it": refused(coding(b"Transfer-Encoding: \x0bchunked")),
        "form feed behind it": refused(coding(b"Transfer-Encoding: chunked\x0c")),
        "controls around it (Gunicorn 3364)": refused(
            coding(b"Transfer-Encoding: \x1c\x1dchunked\x1e\x1f")
        ),
        "next line behind it": refused(coding(b"Transfer-Encoding: chunked\x85")),
        "no-break space before it": refused(coding(b"Transfer-Encoding: \xa0chunked")),
        "NUL behind it": refused(coding(b"Transfer-Encoding: chunked\0")),
        "Kelvin sign": refused(coding("Transfer-Encoding: chun\u212aed".encode())),
        "space before the colon (CVE-2019-16276, Go)": refused(
            coding(b"Transfer-Encoding : chunked")
        ),
        "tab before the colon": refused(coding(b"Transfer-Encoding\t: chunked")),
        "NUL before the colon": refused(coding(b"Transfer-Encoding\0: chunked")),
        "identity before it": refused(
            coding(b"Transfer-Encoding: identity, chunked"), NOT_IMPLEMENTED
        ),
        "identity behind it": refused(coding(b"Transfer-Encoding: chunked, identity")),
        "another in a folded line": refused(coding(b"Transfer-Encoding: chunked\r\n , identity")),
        "cannot be named away": taken(coding(b"Connection: Transfer-Encoding", CHUNKED)),
        "space before the name": refused(coding(b" Transfer-Encoding: chunked")),
        "folded": refused(coding(b"Transfer-Encoding:\r\n chunked")),
        "folded in its name": refused(coding(b"Transfer-\r\n Encoding: chunked")),
        "behind a bare LF (CVE-2022-32214, Node.js)": refused(
            coding(b"X: y\nTransfer-Encoding: chunked")
        ),
        "behind a bare CR (CVE-2023-30589, Node.js)": refused(
            coding(b"X: \rxTransfer-Encoding: chunked")
        ),
        "behind a bare CR of its own": refused(coding(b"X: y\rTransfer-Encoding: chunked")),
        "in HTTP/1.0": refused(head(CHUNKED, line=b"PUT /upload/x HTTP/1.0") + HELLO),
        "in HTTP/1.0 kept alive": refused(
            head(CHUNKED, b"Connection: keep-alive", line=b"PUT /upload/x HTTP/1.0") + HELLO
        ),
        "in the target": refused(
            head(line=b"PUT /upload/x HTTP/1.1\r\tTransfer-Encoding: chunked") + HELLO
        ),
    },
    "RFC 9112, 6.3: both (CL.TE, TE.CL, TE.TE, CL.0)": {
        "CL.TE": refused(head(b"Content-Length: 6", CHUNKED) + b"0\r\n\r\nG"),
        "CL.TE of a whole request": refused(
            head(b"Content-Length: %d" % (len(SMUGGLED) + 5), CHUNKED) + b"0\r\n\r\n" + SMUGGLED
        ),
        "TE.CL": refused(
            head(CHUNKED, b"Content-Length: 4") + b"2d\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"
        ),
        "lengths that agree": refused(head(CHUNKED, b"Content-Length: 15") + HELLO),
        "an invalid length": refused(head(CHUNKED, b"Content-Length: x") + HELLO),
        "a length of 0": refused(head(b"Content-Length: 0", CHUNKED) + HELLO),
        "TE.TE, one of them unknown": refused(coding(CHUNKED, b"Transfer-Encoding: x", LENGTH)),
        "TE.TE, identity (CVE-2024-6827, Gunicorn)": refused(
            coding(b"Transfer-Encoding: identity", LENGTH)
        ),
        "TE.TE, malformed": refused(coding(LENGTH, b"Transfer-Encoding: xchunked")),
        "TE.TE, space before the colon": refused(coding(LENGTH, b"Transfer-Encoding : chunked")),
        "TE.TE, tab before the colon": refused(coding(LENGTH, b"Transfer-Encoding\t: chunked")),
        "TE.TE, in a value's second line": refused(coding(LENGTH, b"X: y\n\tTransfer-Encoding: x")),
        "an underscore is no hyphen": taken(head(b"Transfer_Encoding: chunked", LENGTH) + b"hello"),
        "another name is no framing": taken(
            head(b"X-Transfer-Encoding: chunked", LENGTH) + b"hello"
        ),
        "in HTTP/1.0": refused(head(LENGTH, CHUNKED, line=b"PUT /upload/x HTTP/1.0") + HELLO),
        "CL.0: what follows is a request": Case(
            length(b"0", b"") + SMUGGLED, ("201", "404 not-found"), (b"",), closes=True
        ),
        "no length: what follows is a request": Case(
            head() + SMUGGLED, ("201", "404 not-found"), (b"",), closes=True
        ),
        "no length: what follows is no request": Case(
            head() + b"hello\r\n\r\n", ("201", "400 bad-request"), (b"",), closes=True
        ),
        "GET with a request as content": refused(
            head(b"Content-Length: %d" % len(SMUGGLED), line=b"GET /upload HTTP/1.1") + SMUGGLED,
            "405 method-not-allowed",
        ),
        "unread content is no request": refused(
            head(
                b"Content-Length: %d" % len(SMUGGLED),
                b"Content-Encoding: gzip",
            )
            + SMUGGLED,
            "415 unsupported-media-type",
        ),
        "0.CL: the client waits, and its content is a request": taken(
            head(b"Expect: 100-continue", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
            SMUGGLED,
        ),
        "0.CL: the length of a known path without content": refused(
            head(b"Content-Length: %d" % len(SMUGGLED), line=b"GET /upload HTTP/1.1", host=b"")
            + SMUGGLED
        ),
        "0.CL: a length in the trailers": refused(
            chunks(b"0\r\nContent-Length: 44\r\n\r\n") + SMUGGLED
        ),
        "empty lines between requests": Case(
            length(b"5") + b"\r\n\r\n" + length(b"0", b""), ("201", "201"), (b"hello", b"")
        ),
        "pipelined": Case(
            length(b"5") + coding(CHUNKED) + head(), ("201",) * 3, (b"hello", b"hello", b"")
        ),
    },
    "RFC 9112, 7.1: chunks": {
        "one": taken(size(b"5\r\n")),
        "many": taken(chunks(b"1\r\nh\r\n" * 50 + b"0\r\n\r\n"), b"h" * 50),
        "none": taken(chunks(b"0\r\n\r\n"), b""),
        "capital": taken(chunks(b"A\r\n0123456789\r\n0\r\n\r\n"), b"0123456789"),
        "leading zeros": taken(size(b"0000000000000005\r\n")),
        "last one of many zeros": taken(end(b"0000\r\n\r\n")),
        "a request as content": taken(
            chunks(b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"), SMUGGLED
        ),
        "no size": refused(size(b"\r\n")),
        "no size, an extension": refused(size(b";a=b\r\n")),
        "0x": refused(size(b"0x5\r\n")),
        "sign": refused(size(b"+5\r\n")),
        "negative": refused(size(b"-5\r\n")),
        "underscore": refused(size(b"0_5\r\n")),
        "fraction": refused(size(b"5.0\r\n")),
        "comma": refused(size(b"5,5\r\n")),
        "not hexadecimal": refused(size(b"g\r\n")),
        "full width": refused(size("\uff15\r\n".encode())),
        "white space before it": refused(size(b" 5\r\n")),
        "white space behind it": refused(size(b"5 \r\n")),
        "tab behind it": refused(size(b"5\t\r\n")),
        "17 digits (hyper, CVE-2021-32714)": refused(size(b"10000000000000005\r\n")),
        "17 digits, zeros": refused(size(b"0" * 16 + b"5\r\n")),
        "2 to the 63": refused(size(b"8000000000000005\r\n")),
        "2 to the 64 less 1": refused(size(b"ffffffffffffffff\r\n")),
        "without end": refused(size(b"0" * 5000), TOO_LARGE),
        "LF behind it (CVE-2025-22871, Go)": refused(size(b"5\n")),
        "CR behind it": refused(size(b"5\r")),
        "CR CR LF behind it": refused(size(b"5\r\r\n")),
        "NUL behind it": refused(size(b"5\0\r\n")),
        "data too long (CVE-2025-43859, h11)": refused(chunks(b"5\r\nhelloXX0\r\n\r\n")),
        "data too long by a line": refused(chunks(b"3\r\nhello\r\n0\r\n\r\n")),
        "data too short": refused(chunks(b"6\r\nhello\r\n0\r\n\r\n")),
        "LF behind the data": refused(chunks(b"5\r\nhello\n0\r\n\r\n")),
        "CR behind the data": refused(chunks(b"5\r\nhello\r0\r\n\r\n")),
        "nothing behind the data": refused(chunks(b"5\r\nhello0\r\n\r\n")),
        "LF behind the last": refused(end(b"0\n\r\n")),
        "LF for the end": refused(end(b"0\r\n\n")),
        "CR CR LF for the end": refused(end(b"0\r\n\r\r\n")),
        "LF LF for the end": refused(end(b"0\n\n")),
        "request for the end": refused(end(b"0\r\n" + SMUGGLED)),
    },
    "RFC 9112, 7.1.1: chunk extensions": {
        "name": taken(size(b"5;a\r\n")),
        "name and value": taken(size(b"5;a=b;c=d\r\n")),
        "quoted value": taken(size(b'5;a="b;c=\\"d\\" \xff"\r\n')),
        "on the last": taken(end(b"0;a=b\r\n\r\n")),
        "none behind the semicolon": refused(size(b"5;\r\n")),
        "white space (6.1.1, BWS)": refused(size(b"5 ; a = b\r\n")),
        "no name": refused(size(b"5;=b\r\n")),
        "no value": refused(size(b"5;a=\r\n")),
        "unclosed quote": refused(size(b'5;a="b\r\n')),
        "quote closed by a backslash": refused(size(b'5;a="b\\\r\n')),
        "line break in quotes": refused(size(b'5;a="\r\n"\r\n')),
        "LF in quotes": refused(size(b'5;a="\n"\r\n')),
        "TERM.EXT: LF (CVE-2025-55315, Kestrel)": refused(
            chunks(b"2;\nxx\r\n22\r\n0\r\n\r\n" + SMUGGLED + b"0\r\n\r\n")
        ),
        "EXT.TERM: LF (CVE-2025-58056, Netty)": refused(chunks(b"1;\n\r\nh\r\n0\r\n\r\n")),
        "LF in a name (Gunicorn 3327; CVE-2024-52304, aiohttp)": refused(size(b"5;a\nb\r\n")),
        "CR in a name": refused(size(b"5;a\rb\r\n")),
        "CR and anything for a line break": refused(size(b"5;a\rX")),
        "TERM.SPILL: LF behind the data": refused(chunks(b"5\r\nhello\n\r\n0\r\n\r\n")),
        "ONE.TWO: two bytes for one": refused(chunks(b"5\r\nhello\n\n0\r\n\r\n")),
        "NUL": refused(size(b"5;a=\0\r\n")),
        "not ASCII": refused(size(b"5;a=\xff\r\n")),
        "long": refused(size(b"5;" + b"a" * 300 + b"\r\n"), TOO_LARGE),
        "without end": refused(size(b"5;" + b"a" * 5000), TOO_LARGE),
        "of many chunks (CVE-2023-39326, Go)": refused(
            chunks((b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100 + b"0\r\n\r\n"), TOO_LARGE
        ),
    },
    "RFC 9112, 7.1.2 and RFC 9110, 6.5: trailers": {
        "a field": taken(end(b"0\r\nX: y\r\n\r\n")),
        "at the limit": taken(end(b"0\r\n" + b"X:\r\n" * 100 + b"\r\n")),
        "over the limit": refused(end(b"0\r\n" + b"X:\r\n" * 101 + b"\r\n"), TOO_LARGE),
        "over the limit of bytes (CVE-2026-22815, aiohttp)": refused(
            end(b"0\r\nX: " + b"x" * 16384 + b"\r\n\r\n"), TOO_LARGE
        ),
        "Content-Length": refused(end(b"0\r\nContent-Length: 5\r\n\r\n")),
        "Transfer-Encoding (CVE-2025-53643, aiohttp)": refused(
            end(b"0\r\nTransfer-Encoding: chunked\r\n\r\n")
        ),
        "Host": refused(end(b"0\r\nHost: relay.test\r\n\r\n")),
        "Authorization": refused(end(b"0\r\nAuthorization: Bearer x\r\n\r\n")),
        "Content-Type": refused(end(b"0\r\nContent-Type: a/b\r\n\r\n")),
        "Expect": refused(end(b"0\r\nExpect: 100-continue\r\n\r\n")),
        "Connection": refused(end(b"0\r\nConnection: close\r\n\r\n")),
        "space before the colon": refused(end(b"0\r\nX : y\r\n\r\n")),
        "no colon": refused(end(b"0\r\nX\r\n\r\n")),
        "folded": refused(end(b"0\r\nX: a\r\n b\r\n\r\n")),
        "white space line": refused(end(b"0\r\n \r\n\r\n")),
        "LF behind it": refused(end(b"0\r\nX: y\n\r\n")),
        "CR in it": refused(end(b"0\r\nX: a\rb\r\n\r\n")),
        "NUL in it": refused(end(b"0\r\nX: \0\r\n\r\n")),
        "request line in it": refused(end(b"0\r\nGET / HTTP/1.1\r\n\r\n")),
    },
}
