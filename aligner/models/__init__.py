"""The networks, on Megatron-core."""
