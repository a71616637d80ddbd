"""Commands that act on a finished model or on a run directory: check, export, push, report."""
