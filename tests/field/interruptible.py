"""The command line, with Ctrl-C as a terminal has it: pytest's own processes may ignore it, and theirs then do, too."""

import signal

from delora.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
