"""The arguments of every command, one file a command; what does the work is imported when a command runs."""
