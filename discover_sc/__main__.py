"""python -m discover_sc: the command line."""

from ._cli import main

main()
