"""What a run will need, from the config.json of its models: simulated ranks of few layers, and a line through them."""
