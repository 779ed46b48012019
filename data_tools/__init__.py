"""From raw pairs to shards: `python -m data_tools COMMAND --help`."""
