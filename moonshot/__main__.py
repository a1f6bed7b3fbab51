"""`python -m moonshot` is the command line, as `moonshot` is."""

from moonshot.app.cli import main

main()
