"""One run: its identity, its journal, and the pipeline that wires the stages."""
