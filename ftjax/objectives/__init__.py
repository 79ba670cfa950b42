"""From packed rows, through the model, to a loss: one file, one objective."""
