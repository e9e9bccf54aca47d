"""Arguments of every command, one module a room; the work is imported when a command runs."""
