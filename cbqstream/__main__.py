"""Entry point of `python -m cbqstream`."""

from cbqstream.cli.main import main

main()
