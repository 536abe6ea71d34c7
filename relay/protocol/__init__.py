"""Pure protocol code: no async, no sockets, no clock, no logging, no pika, no h11."""
