"""An HTTP client whose form upload can be stopped shortly before its end.

Knows HTTP and forms only as far as the standard library and urllib3 do.
"""

import http.client
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from urllib3.filepost import encode_multipart_formdata

# A plain field's bytes, or a file's name and bytes.
Part = bytes | tuple[str, bytes]

ANSWER_SECONDS = 60


class HeldUpload:
    """One form upload of which the last bytes are kept back until it is told to go on.

    A context manager that closes the connection.
    """

    def __init__(self, url: str, fields: dict[str, Part], *, held_back: int) -> None:
        """Sends all but the last `held_back` bytes of the form to `url`/upload.

        Returns once the kernel has taken them, or the service has refused them.
        """
        body, content_type = encode_multipart_formdata(fields)
        sent = len(body) - held_back
        self._rest = body[sent:]
        target = urlsplit(url)
        assert target.hostname is not None
        self._connection = http.client.HTTPConnection(
            target.hostname, target.port, timeout=ANSWER_SECONDS
        )
        self._connection.putrequest("POST", "/upload")
        self._connection.putheader("Content-Type", content_type)
        self._connection.putheader("Content-Length", str(len(body)))
        self._connection.endheaders()
        self._send(body[:sent])

    def finish(self) -> int:
        """Sends the rest and returns the status of the answer."""
        self._send(self._rest)
        with self._connection.getresponse() as response:
            response.read()
            return response.status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def _send(self, data: bytes) -> None:
        try:
            self._connection.send(data)
        except (BrokenPipeError, ConnectionResetError):
            # Refused before its end: the answer is there to be read all the same.
            self._rest = b""


def upload(url: str, fields: dict[str, Part]) -> int:
    """Sends a form in one go and returns the status of the answer."""
    with HeldUpload(url, fields, held_back=0) as whole:
        return whole.finish()
