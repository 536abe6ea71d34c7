"""relay streams HTTP uploads into RabbitMQ, frame by frame, without ever writing a file.

``python -m relay`` and the ``relay`` command are the way in (``relay/cli.py``). The package itself
imports nothing, so that importing one module never brings in another.
"""

__version__ = "0.1.0"
