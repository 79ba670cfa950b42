"""Every objective learns: one short run each, and what it changes on held-out rows."""
