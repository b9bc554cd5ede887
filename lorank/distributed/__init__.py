"""Models larger than one device: tensor parallelism that cuts at the bottleneck."""
