"""Which sample stands at which position, whatever the ranks and workers."""
