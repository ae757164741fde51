"""`python -m launch.cluster`: see ``launch.cluster.command``."""

import sys

from launch.cluster.command import main

if __name__ == "__main__":
    sys.exit(main())
