"""The upload service of old: Flask takes a form, pika forwards it to RabbitMQ.

Written as a team writes it that has read both tutorials: `request.files`, `request.form`,
a `BlockingConnection` with confirms. It runs under Werkzeug's own threaded server, which
hands the body to the application as it arrives; gunicorn does the same, waitress would
write a temporary file of its own on top. What is observed here is thus Werkzeug's form
parser and nothing else.

It knows nothing of relay, and of the tests only that they want to know its port.
"""

import argparse
import logging
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import IO

import pika
from flask import Flask, request
from flask.typing import ResponseReturnValue
from pika.adapters.blocking_connection import BlockingChannel
from werkzeug.serving import make_server

PIECE_BYTES = 128 * 1024


def create_app(amqp_url: str, exchange: str, routing_key: str, *, limit_fields: bool) -> Flask:
    """Builds the service.

    Args:
        amqp_url: the broker.
        exchange: where every piece of every upload is published.
        routing_key: the routing key of every piece.
        limit_fields: False restores what Flask did before release 3.1, when a plain field
            could be of any size.
    """
    app = Flask(__name__)
    if not limit_fields:
        app.config["MAX_FORM_MEMORY_SIZE"] = None

    @app.post("/upload")
    def upload() -> ResponseReturnValue:
        """Forwards every file and every plain field of the form."""
        files = list(request.files.items(multi=True))
        fields = list(request.form.items(multi=True))
        upload_id = str(uuid.uuid4())
        with closing(pika.BlockingConnection(pika.URLParameters(amqp_url))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            sent = 0
            for name, file in files:
                pieces = read_in_pieces(file.stream)
                sent += forward(channel, exchange, routing_key, upload_id, name, pieces)
            for name, value in fields:
                pieces = iter([value.encode()])
                sent += forward(channel, exchange, routing_key, upload_id, name, pieces)
        return {"upload": upload_id, "bytes": sent}, 201

    return app


def read_in_pieces(stream: IO[bytes], size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yields what is left of a file, `size` bytes at a time."""
    while piece := stream.read(size):
        yield piece


def forward(
    channel: BlockingChannel,
    exchange: str,
    routing_key: str,
    upload_id: str,
    name: str,
    pieces: Iterator[bytes],
) -> int:
    """Publishes one part of the form, waiting for the broker's confirm of each piece.

    Returns:
        How many bytes were published.
    """
    sent = 0
    for number, piece in enumerate(pieces):
        properties = pika.BasicProperties(
            correlation_id=upload_id, headers={"name": name, "piece": number}
        )
        channel.basic_publish(exchange, routing_key, piece, properties)
        sent += len(piece)
    return sent


def main() -> None:
    """Serves on a free port of the loopback interface and prints the URL on a line."""
    arguments = argparse.ArgumentParser(description="the upload service of old")
    arguments.add_argument("--amqp", required=True, metavar="URL")
    arguments.add_argument("--exchange", default="")
    arguments.add_argument("--routing-key", default="uploads")
    arguments.add_argument(
        "--unlimited-fields",
        action="store_true",
        help="plain fields of any size, as before Flask 3.1",
    )
    options = arguments.parse_args()
    app = create_app(
        options.amqp,
        options.exchange,
        options.routing_key,
        limit_fields=not options.unlimited_fields,
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(f"http://127.0.0.1:{server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
