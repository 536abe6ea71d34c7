"""Frames into RabbitMQ: the only package that knows pika, and knows nothing of HTTP."""
