"""Request heads by section of RFC 9110, 9112 and 3986: which are taken, and which are not."""

from tests.strict.cases import HOST, LENGTH, Case, Table, head, refused, taken


def line(start: bytes, *, host: bytes = HOST) -> bytes:
    """A request without a body that begins with that line."""
    return head(line=start, host=host)


def target(value: bytes, *, method: bytes = b"PUT") -> bytes:
    """A request without a body for that target."""
    return line(method + b" " + value + b" HTTP/1.1")


def host(value: bytes) -> bytes:
    """A request without a body, of that Host."""
    return head(host=b"Host: " + value)


def field(value: bytes) -> bytes:
    """A request with the body ``hello`` and one more field line before its Content-Length."""
    return head(value, LENGTH) + b"hello"


def empty(data: bytes) -> Case:
    """An upload of no bytes."""
    return taken(data, b"")


NOT_FOUND = "404 not-found"
NOT_ALLOWED = "405 method-not-allowed"
NOT_IMPLEMENTED = "501 not-implemented"
TOO_LARGE = "431 headers-too-large"

HEADS: Table = {
    "RFC 9112, 2.2: message parsing": {
        "empty line before": taken(b"\r\n" + head(LENGTH) + b"hello"),
        "two empty lines before": taken(b"\r\n\r\n" + head(LENGTH) + b"hello"),
        "three empty lines before": refused(b"\r\n\r\n\r\n" + head()),
        "bare LF before": refused(b"\n" + head()),
        "bare CR before": refused(b"\r" + head()),
        "white space before": refused(b" " + head()),
        "bare LF everywhere": refused(head(LENGTH).replace(b"\r\n", b"\n") + b"hello"),
        "bare LF after the request line": refused(head().replace(b"1.1\r\n", b"1.1\n")),
        "bare LF after a field": refused(head(b"X: y").replace(b"y\r\n", b"y\n")),
        "bare LF for the empty line": refused(head()[:-2] + b"\n"),
        "LF CR": refused(head(b"X: y").replace(b"y\r\n", b"y\n\r")),
        "CR CR LF": refused(head(b"X: y").replace(b"y\r\n", b"y\r\r\n")),
        "bare CR in the target": refused(target(b"/upload/\rx")),
        "bare CR in a name": refused(field(b"X\r: y")),
        "bare CR in a value": refused(field(b"X: a\rb")),
        "bare CR before a colon": refused(field(b"Transfer-Encoding\r: chunked")),
        "white space between request line and fields": refused(
            head().replace(b"1.1\r\n", b"1.1\r\n ")
        ),
        "white space line for the empty line": refused(head()[:-2] + b" \r\n\r\n"),
        "NUL in the method": refused(line(b"P\0UT /upload/x HTTP/1.1")),
        "NUL in the target": refused(target(b"/upload/\0")),
        "NUL in a name": refused(field(b"X\0: y")),
        "NUL in a value": refused(field(b"X: \0")),
        "UTF-8 byte order mark": refused(b"\xef\xbb\xbf" + head()),
        "TLS": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    },
    "RFC 9112, 2.3: version": {
        "1.0 closes": taken(line(b"PUT /upload/x HTTP/1.0"), b"", closes=True),
        "1.0 closes whatever it says": taken(
            head(b"Connection: keep-alive", line=b"PUT /upload/x HTTP/1.0"), b"", closes=True
        ),
        "1.0 without Host": taken(line(b"PUT /upload/x HTTP/1.0", host=b""), b"", closes=True),
        "1.2 is read as 1.1": empty(line(b"PUT /upload/x HTTP/1.2")),
        "1.9 is read as 1.1": empty(line(b"PUT /upload/x HTTP/1.9")),
        "1.9 needs a Host": refused(line(b"PUT /upload/x HTTP/1.9", host=b"")),
        "0.9 with a version": refused(line(b"GET /upload HTTP/0.9"), "505 http-version"),
        "0.9 without a version": refused(b"GET /upload\r\n\r\n"),
        "2.0": refused(line(b"PUT /upload/x HTTP/2.0"), "505 http-version"),
        "3.0": refused(line(b"PUT /upload/x HTTP/3.0"), "505 http-version"),
        "preface of HTTP/2 (RFC 9113, 3.4)": refused(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505 http-version"
        ),
        "lower case": refused(line(b"PUT /upload/x http/1.1")),
        "one digit": refused(line(b"PUT /upload/x HTTP/1")),
        "two digits": refused(line(b"PUT /upload/x HTTP/1.10")),
        "three numbers": refused(line(b"PUT /upload/x HTTP/1.1.1")),
        "leading zero": refused(line(b"PUT /upload/x HTTP/01.1")),
        "comma": refused(line(b"PUT /upload/x HTTP/1,1")),
        "sign": refused(line(b"PUT /upload/x HTTP/+1.1")),
        "digits that are not ASCII": refused("PUT /upload/x HTTP/1.\u0661\r\n\r\n".encode()),
        "white space in it": refused(line(b"PUT /upload/x HTTP/ 1.1")),
        "another protocol": refused(line(b"PUT /upload/x RTSP/1.0")),
    },
    "RFC 9112, 3: request line": {
        "nothing but white space": refused(b" \r\n\r\n"),
        "no target": refused(line(b"PUT HTTP/1.1")),
        "two spaces": refused(line(b"PUT  /upload/x HTTP/1.1")),
        "space at the end": refused(line(b"PUT /upload/x HTTP/1.1 ")),
        "tab": refused(line(b"PUT\t/upload/x\tHTTP/1.1")),
        "vertical tab": refused(line(b"PUT\x0b/upload/x HTTP/1.1")),
        "form feed": refused(line(b"PUT /upload/x\x0cHTTP/1.1")),
        "space in the target": refused(target(b"/upload/a b")),
        "request within the line": refused(line(b"GET / HTTP/1.1 PUT /upload/x HTTP/1.1")),
        "method that is not a token": refused(line(b"P(T /upload/x HTTP/1.1")),
        "method with a colon": refused(line(b"PUT: /upload/x HTTP/1.1")),
        "target that is not ASCII": refused(target(b"/upload/\xc3\xa4")),
        "line over the limit": refused(target(b"/upload/" + b"x" * 16384), TOO_LARGE),
        "name of many bytes": empty(target(b"/upload/" + b"x" * 8000)),
    },
    "RFC 9110, 9: methods": {
        "GET": refused(target(b"/upload", method=b"GET"), NOT_ALLOWED),
        "GET with a body": refused(
            head(LENGTH, line=b"GET /upload HTTP/1.1") + b"hello", NOT_ALLOWED
        ),
        "HEAD": refused(target(b"/upload", method=b"HEAD"), "405"),
        "DELETE": refused(target(b"/upload/x", method=b"DELETE"), NOT_ALLOWED),
        "TRACE": refused(target(b"/upload", method=b"TRACE"), NOT_ALLOWED),
        "PATCH": refused(target(b"/upload/x", method=b"PATCH"), NOT_ALLOWED),
        "CONNECT": refused(target(b"relay.test:80", method=b"CONNECT"), NOT_ALLOWED),
        "CONNECT with a path": refused(target(b"/upload", method=b"CONNECT"), NOT_ALLOWED),
        "methods have a case": refused(target(b"/upload", method=b"post"), NOT_IMPLEMENTED),
        "unknown": refused(target(b"/upload", method=b"BREW"), NOT_IMPLEMENTED),
        "very long": refused(target(b"/upload", method=b"P" * 2000), NOT_IMPLEMENTED),
        "OPTIONS *": refused(target(b"*", method=b"OPTIONS"), NOT_ALLOWED),
    },
    "RFC 9112, 3.2: request target": {
        "origin form": empty(target(b"/upload/x?y=z")),
        "origin form, encoded": empty(target(b"/%75pload/%78")),
        "asterisk form": refused(target(b"*")),
        "authority form": refused(target(b"relay.test:80")),
        "absolute form": empty(target(b"http://relay.test/upload/x")),
        "absolute form, another Host: to be ignored": empty(target(b"http://other.test/upload/x")),
        "absolute form, no Host": refused(line(b"PUT http://a/upload/x HTTP/1.1", host=b"")),
        "absolute form, invalid Host": refused(
            line(b"PUT http://a/upload/x HTTP/1.1", host=b"Host: a b")
        ),
        "absolute form, no authority": refused(target(b"http:///upload/x")),
        "absolute form, one slash": refused(target(b"http:/upload/x")),
        "absolute form, userinfo (RFC 9110, 4.2.4)": refused(target(b"http://u:p@a/upload/x")),
        "absolute form, another scheme": refused(target(b"gopher://a/upload/x")),
        "absolute form, elsewhere": refused(target(b"http://a/x"), NOT_FOUND),
        "absolute form, empty path": refused(target(b"http://relay.test"), NOT_FOUND),
        "relative": refused(target(b"upload/x")),
        "fragment": refused(target(b"/upload/x#y")),
        "two slashes": refused(target(b"//upload/x"), NOT_FOUND),
        "backslash": refused(target(b"/upload\\x")),
        "quote": refused(target(b'/upload/"x"')),
        "angle brackets": refused(target(b"/upload/<x>")),
        "dot segment": refused(target(b"/upload/../x")),
        "encoded dot segment": refused(target(b"/upload/%2e%2E/x")),
        "dots with a parameter are a name": empty(target(b"/upload/..;")),
        "encoded NUL": refused(target(b"/upload/%00")),
        "half an encoding": refused(target(b"/upload/%4")),
        "not hexadecimal": refused(target(b"/upload/%zz")),
        "overlong UTF-8": refused(target(b"/upload/%c0%ae")),
        "encoded line break in a name": empty(target(b"/upload/%0d%0aX:%20y")),
        "encoded slash is no separator": refused(target(b"/upload%2fx"), NOT_FOUND),
        "unknown path": refused(target(b"/"), NOT_FOUND),
        "unknown route": Case(target(b"/upload/nowhere/x"), (NOT_FOUND,)),
    },
    "RFC 3986, 3.2.2 and RFC 9110, 7.2: Host": {
        "name": empty(host(b"relay-1.example")),
        "name with its last dot": empty(host(b"relay.example.")),
        "name with an underscore": empty(host(b"relay_1")),
        "name with a port": empty(host(b"relay.example:8480")),
        "name with an empty port": empty(host(b"relay.example:")),
        "encoded name": empty(host(b"b%C3%BCcher.example")),
        "IPv4": empty(host(b"127.0.0.1:8480")),
        "IPv6": empty(host(b"[::1]:8480")),
        "IPv6 with an IPv4": empty(host(b"[::ffff:127.0.0.1]")),
        "white space around it": empty(host(b" \trelay.test \t")),
        "none": refused(head(host=b"")),
        "empty": refused(host(b"")),
        "twice (CVE-2026-34525, aiohttp)": refused(head(HOST)),
        "twice and different": refused(head(b"Host: other.test")),
        "twice in different case": refused(head(b"hOST: other.test")),
        "list": refused(host(b"a, b")),
        "userinfo": refused(host(b"user@relay.test")),
        "path": refused(host(b"relay.test/x")),
        "query": refused(host(b"relay.test?x")),
        "URL": refused(host(b"http://relay.test")),
        "white space in it": refused(host(b"relay test")),
        "port that is none": refused(host(b"relay.test:http")),
        "port too large": refused(host(b"relay.test:65536")),
        "port with a sign": refused(host(b"relay.test:-1")),
        "two ports": refused(host(b"relay.test:1:2")),
        "no name": refused(host(b":80")),
        "bytes that are not ASCII": refused(host(b"b\xfccher")),
        "half an encoding": refused(host(b"a%2")),
        "IPv6 without brackets": refused(host(b"::1")),
        "IPv6 with a zone": refused(host(b"[fe80::1%25eth0]")),
        "IPv6 too long": refused(host(b"[1:2:3:4:5:6:7:8:9]")),
        "IPv6 unclosed": refused(host(b"[::1")),
        "IPv6 with more behind": refused(host(b"[::1]x")),
        "IP of the future": refused(host(b"[v1.x]")),
        "white space before the colon": refused(head(host=b"Host : relay.test")),
        "folded": refused(head(host=b"Host:\r\n relay.test")),
    },
    "RFC 9112, 5 and RFC 9110, 5: fields": {
        "no white space": taken(field(b"X:y")),
        "much white space": taken(field(b"X: \t \t y \t ")),
        "empty": taken(field(b"X:")),
        "obs-text": taken(field(b"X: \x80\xff")),
        "every token character": taken(field(b"!#$%&'*+-.^_`|~09azAZ: y")),
        "colons in the value": taken(field(b"X: :y:")),
        "underscores are not hyphens": taken(field(b"Content_Length: 9")),
        "space before the colon": refused(field(b"X : y")),
        "tab before the colon": refused(field(b"X\t: y")),
        "no colon": refused(field(b"X")),
        "no name": refused(field(b": y")),
        "space in the name": refused(field(b"X Y: z")),
        "name that is not a token": refused(field(b"X(Y): z")),
        "name that is not ASCII": refused(field(b"X\xe4: y")),
        "folded (obs-fold)": refused(field(b"X: a\r\n b")),
        "folded with a tab": refused(field(b"X: a\r\n\tb")),
        "folded to nothing": refused(field(b"X: a\r\n ")),
        "folded first field": refused(head(host=b" folded: x\r\n" + HOST)),
        "escape": refused(field(b"X: \x1b[31m")),
        "delete": refused(field(b"X: \x7f")),
        "vertical tab": refused(field(b"X: \x0by")),
        "one field at the limit of bytes": taken(field(b"X: " + b"x" * 16000)),
        "one field over the limit of bytes": refused(field(b"X: " + b"x" * 16384), TOO_LARGE),
        "name over the limit of bytes": refused(field(b"X" * 16384 + b": x"), TOO_LARGE),
        "many fields over the limit of bytes": refused(
            head(*[b"X: " + b"x" * 300] * 60), TOO_LARGE
        ),
        "fields at the limit": empty(head(*[b"X:"] * 99)),
        "fields over the limit": refused(head(*[b"X:"] * 100), TOO_LARGE),
    },
    "RFC 9110, 7.6.1, 7.8 and RFC 9112, 9: connections": {
        "close": taken(field(b"Connection: close"), closes=True),
        "close in a list": taken(field(b"Connection: x, CLOSE ,"), closes=True),
        "close in the second field": taken(
            head(b"Connection: x", b"Connection: close", LENGTH) + b"hello", closes=True
        ),
        "close is no part of a word": taken(field(b"Connection: closed")),
        "keep-alive": taken(field(b"Connection: keep-alive")),
        "cannot name the framing away": taken(field(b"Connection: Content-Length")),
        "cannot name Host away": taken(field(b"Connection: Host")),
        "upgrade to h2c is ignored": taken(
            head(
                b"Connection: Upgrade, HTTP2-Settings",
                b"Upgrade: h2c",
                b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
                LENGTH,
            )
            + b"hello"
        ),
        "upgrade to WebSocket is ignored": taken(
            head(b"Connection: Upgrade", b"Upgrade: websocket", LENGTH) + b"hello"
        ),
        "upgrade of a chunked body is ignored": taken(
            head(b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: chunked")
            + b"5\r\nhello\r\n0\r\n\r\n"
        ),
        "upgrade without Connection": taken(field(b"Upgrade: websocket")),
        "Keep-Alive means nothing": taken(field(b"Keep-Alive: timeout=5, max=1")),
        "Proxy-Connection means nothing": taken(field(b"Proxy-Connection: close")),
        "TE means nothing": taken(field(b"TE: trailers, chunked;q=0")),
    },
    "RFC 9110, 10.1.1: Expect": {
        "with the body at once": taken(field(b"Expect: 100-continue")),
        "case": taken(field(b"Expect: 100-CONTINUE")),
        "another": refused(field(b"Expect: 200-ok"), "417 expectation-failed"),
        "words around it": refused(field(b"Expect: y 100-continue"), "417 expectation-failed"),
        "with a parameter": refused(field(b"Expect: 100-continue;x"), "417 expectation-failed"),
        "another beside it": refused(field(b"Expect: 100-continue, x"), "417 expectation-failed"),
        "folded": refused(field(b"Expect:\r\n 100-continue")),
        "with a GET": refused(
            head(b"Expect: 100-continue", LENGTH, line=b"GET /upload HTTP/1.1") + b"hello",
            NOT_ALLOWED,
        ),
    },
    "RFC 9110, 8: content": {
        "media type": taken(field(b"Content-Type: text/plain")),
        "no media type": refused(field(b"Content-Type: text")),
        "two media types": refused(
            head(b"Content-Type: a/b", b"Content-Type: a/b", LENGTH) + b"hello"
        ),
        "media types in a list": refused(field(b"Content-Type: a/b, c/d")),
        "two dispositions": refused(
            head(*[b"Content-Disposition: x"] * 2, LENGTH, line=b"POST /upload HTTP/1.1") + b"hello"
        ),
        "coding": refused(field(b"Content-Encoding: gzip"), "415 unsupported-media-type"),
        "coding in the second field": refused(
            head(b"Content-Encoding: identity", b"Content-Encoding: br", LENGTH) + b"hello",
            "415 unsupported-media-type",
        ),
        "range (14.5)": refused(field(b"Content-Range: bytes 0-4/10")),
        "two authorizations": refused(
            head(b"Authorization: Bearer a", b"Authorization: Bearer b", LENGTH) + b"hello"
        ),
        "two keys": refused(head(b"Idempotency-Key: a", b"Idempotency-Key: a", LENGTH) + b"hello"),
    },
}
