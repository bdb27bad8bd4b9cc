"""`python -m sprint` is the command `sprint`; with torchrun: `torchrun … -m sprint distill RECIPE`."""

from sprint.cli.main import command

command()
