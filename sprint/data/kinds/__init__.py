"""One file for each kind of samples."""
