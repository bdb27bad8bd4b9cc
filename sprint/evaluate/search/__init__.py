"""Better step lists for a student."""
