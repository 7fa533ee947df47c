"""The subcommands of `vla`, by what they do. With `bascule/main.py` the shell that sees every room, lazily."""
