"""Formulas as pure functions from tensors to tensors, without I/O, modules, state or moves between devices."""
