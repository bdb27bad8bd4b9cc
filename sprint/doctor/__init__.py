"""What is wrong with a model, a run, a recipe or a data set, and what to do about it."""
