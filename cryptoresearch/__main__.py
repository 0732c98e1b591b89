"""Run the command line by `python -m cryptoresearch`."""

from cryptoresearch.cli import main

if __name__ == "__main__":
    main()
