"""python -m moec is the same as the moec command."""

import sys

from moec.cli import main

if __name__ == "__main__":
    sys.exit(main())
