"""The subcommands of `vla`, one file for each kind. They import what they run inside their functions."""
