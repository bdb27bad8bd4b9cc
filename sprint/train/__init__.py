"""From a teacher to a student: the two stages, their plan, their loop and their page."""
