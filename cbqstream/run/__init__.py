"""One run of `quantize`: its inputs, the pipeline of its windows and stages, and its result."""
