"""Tools that build shards from raw data: `python -m data_tools COMMAND --help`."""
