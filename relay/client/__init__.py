"""``relay send``: files to transfers over HTTP, sent again until they are safe."""
