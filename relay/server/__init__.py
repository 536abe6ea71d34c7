"""HTTP in: the only package that knows h11 and sockets of clients, and knows nothing of AMQP."""
