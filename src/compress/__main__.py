"""`python -m compress`: for launchers that start a module, such as torchrun."""

from compress.cli import main

main()
