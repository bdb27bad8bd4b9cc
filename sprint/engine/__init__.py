"""Who holds what, over processes; optimizers, checkpoints, compiled blocks."""
