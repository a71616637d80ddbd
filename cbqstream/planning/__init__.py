"""Memory, disk space and time that a run will need, computed before it starts."""
