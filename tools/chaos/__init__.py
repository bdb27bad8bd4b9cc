"""Kill, damage and starve runs in every way we know; nothing may be lost."""
