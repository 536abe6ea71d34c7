"""The peer ``flask``: the service of old, run as such services are, and with a window.

What it does with a form is `tests/incident/flask_service.py`'s: `request.files`, which spools to
temporary files, and `request.form`. That one waits for the confirm of each message, and connects to
the broker for each upload; nobody would who measures. Run by gunicorn:
``gunicorn tests.bench.peers.flask_app:app``.
"""

import io

from flask import Flask, request
from flask.typing import ResponseReturnValue

from tests.bench.peers.destination import MESSAGE_BYTES, Destination, NotConfirmed
from tests.bench.peers.pika_publisher import Broker
from tests.incident.flask_service import read_in_pieces


def create_app(destination: Destination) -> Flask:
    """Builds the service."""
    app = Flask(__name__)
    # Flask's own limit is 500 kB; here fields are uploads, too.
    app.config["MAX_FORM_MEMORY_SIZE"] = None
    broker = Broker(destination)

    @app.post("/")
    def upload() -> ResponseReturnValue:
        """Publishes a form's files and fields, or the body."""
        parts = [(name, file.stream) for name, file in request.files.items(multi=True)]
        parts += [
            (name, io.BytesIO(value.encode())) for name, value in request.form.items(multi=True)
        ]
        if request.mimetype != "multipart/form-data":
            parts = [("", request.stream)]
        try:
            with broker.upload() as upload:
                for name, stream in parts:
                    for piece in read_in_pieces(stream, MESSAGE_BYTES):
                        upload.publish(name, piece)
        except NotConfirmed as exc:
            return {"error": str(exc)}, 502
        return {"messages": upload.messages}, 201

    return app


app = create_app(Destination.from_environment())
