"""Running the engine: the three-verb protocol, its torch and fake implementations, K/V slots, a small driver."""
