"""The machine: device, memory, offloaded tensors, scratch buffers, random seeds, signals."""
