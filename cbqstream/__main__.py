"""`python -m cbqstream`."""

from cbqstream.cli import main

main()
