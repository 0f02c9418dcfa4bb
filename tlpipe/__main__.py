"""Run the command line as ``python -m tlpipe``."""

from tlpipe.cli import main

main()
