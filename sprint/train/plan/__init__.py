"""What a run will hold and need, before anything is run."""
