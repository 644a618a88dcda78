"""`python -m jobs` is the `ddpm` command."""

from jobs.cli import main

main()
