"""The hidden states of a teacher over HTTP: what is sent, the server, its clients."""
