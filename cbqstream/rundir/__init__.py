"""The run directory: typed records, the chain of commits, the journal, and the identity of a run."""
