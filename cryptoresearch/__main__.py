"""Run the command line by `python -m cryptoresearch`."""

from cryptoresearch.cli import main

main()
