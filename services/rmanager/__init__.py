"""The rManager library: ledgers, block tables and sessions with daemons."""
