"""The subcommands of `vla`, by what they do. With `vla/cli.py` the shell that sees every room, lazily."""
