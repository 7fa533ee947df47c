"""The websocket server and its torch-free client. May import `policies.chunking` and `policies.load`."""
