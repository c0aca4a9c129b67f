"""`python -m pipeline`: the `asvr` command where the console script is not on PATH."""

from pipeline.cli import main

main()
