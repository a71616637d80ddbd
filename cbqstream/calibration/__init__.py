"""Text or tokens in, segments of token ids out."""
