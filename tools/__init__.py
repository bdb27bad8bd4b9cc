"""Programs of this repository that no user imports."""
