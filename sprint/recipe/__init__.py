"""A run as data: its types, what their values must be, where a recipe is found and how it is read."""
