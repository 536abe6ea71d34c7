"""``relay demo``: the whole path, from a file through a real RabbitMQ and back, on one machine."""
