"""Where tables live: plan, hardware, the sharded model, its initial values and its state."""
