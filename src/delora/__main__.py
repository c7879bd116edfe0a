"""``python -m delora``: the command line, for launchers that start a module in several processes."""

from delora.cli import main

if __name__ == "__main__":
    main()
