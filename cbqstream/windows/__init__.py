"""Windows of transformer blocks: schedule, targets, reconstruction, propagation."""
