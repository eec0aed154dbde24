"""The `d2` command: one small file for each group of commands, one border where errors end."""
