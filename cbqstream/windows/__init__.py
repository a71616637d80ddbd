"""Windows of transformer blocks: schedule, targets, reconstruction and propagation."""
