"""The formulas: pure functions from tensors to tensors. No I/O, no modules, no state, no device moves."""
