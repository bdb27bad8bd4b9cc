"""A run as data: its types, what their values must be, and how a recipe is read."""
