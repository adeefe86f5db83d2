"""Runs in a Flex Template's launcher; its parameters are the flags of `chatflow run`."""

import sys

from chatflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "--no_wait_until_finish", *sys.argv[1:]]))
