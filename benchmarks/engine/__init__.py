"""What every experiment shares: units of work, their stored results, the runner, the command line, tables, pictures."""
