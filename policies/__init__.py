"""A trained model as a control policy: action chunking, the websocket server and its torch-free client."""
