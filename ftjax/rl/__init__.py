"""Learning from rewards: what answers earn, and batches made of them."""
