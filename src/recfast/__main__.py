"""`python -m recfast` is the command `recfast`."""

from recfast.cli import main

main()
