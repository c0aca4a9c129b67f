"""The `asvr` command: recipes, launching either stage, and looking at what they wrote."""
