"""What knows nothing of networks: errors, files, names, seeds, clocks, processes by rank."""
