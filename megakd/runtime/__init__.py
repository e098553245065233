"""From bare processes to ranks: process groups, seeds, device, and what megatron-core needs where there is no GPU."""
