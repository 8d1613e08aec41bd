"""`python -m compress`: for launchers that start a module, such as torchrun."""

from compress.cli import main

if __name__ == "__main__":
    main()
