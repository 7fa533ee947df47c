"""A trained model as a control policy: action chunking, the websocket server and its torch-free client."""

from vla.core.waiting import limit_spinning

limit_spinning()  # before the modules of this package load torch
