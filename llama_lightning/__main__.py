"""`python -m llama_lightning`."""

import sys

from llama_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
