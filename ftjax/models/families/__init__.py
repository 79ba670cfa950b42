"""One file per model family: its `model_type`, and how its `config.json` is read."""
