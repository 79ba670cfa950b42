"""Generation with a key-value cache: sampling, the compiled loop, lanes, a front."""
