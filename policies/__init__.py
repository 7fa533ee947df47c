"""A trained model as a control policy: action chunking, the websocket server and its torch-free client."""

from vla.core.waiting import sleep_while_waiting

sleep_while_waiting()  # before the modules of this package load torch
