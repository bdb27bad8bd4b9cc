"""What made the networks in sprint/lab."""
