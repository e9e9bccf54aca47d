"""Where input rows come from: folders, tables, the embedded set."""
