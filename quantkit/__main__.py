"""`python -m quantkit`: the command line."""

from quantkit.cli.main import main

main()
