"""The `mgsr` command line: one file a command."""
