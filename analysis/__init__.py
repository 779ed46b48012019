"""From finished runs to tables and pictures."""
