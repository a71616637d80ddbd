"""Resources of the process: device, memory, offloaded tensors, scratch buffers, random seeds, timings and signals."""
